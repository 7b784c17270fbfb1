"""Terms that layers add to the loss: counted once, reported by name, with the right gradient in every stage."""

import experts
import jax
import numpy as np
import optax
import pytest
from flax import nnx

import meshpipe
from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.stage.target import ACCELERATOR

LAYERS = [experts.Embed, *[experts.BalancedByLoss] * 6, experts.Head]
(BATCH,) = experts.batches(1)
MICROBATCHES = 4


def trainer_of(pipeline, data=1, layers=LAYERS, **options):
    config = PipelineConfig(num_microbatches=MICROBATCHES, **options)
    mesh = make_mesh(pipeline, data)
    return Trainer(layers, experts.loss, optax.sgd(0.1), batch=BATCH, mesh=mesh, pipeline=config)


@pytest.fixture(scope="module")
def plain():
    """Loss, term, mean entropy and gradients on one device, without the engine: microbatch by microbatch, in which the
    balancing loss is taken, and one division.
    """
    trainer = trainer_of(1)
    params = {path: np.asarray(value) for path, value in trainer.params.items()}
    modules = nnx.List([layer(nnx.Rngs(0)) for layer in LAYERS])
    graphdef, state = nnx.split(modules)

    @jax.jit
    def sums(params, batch):
        def total(params):
            flat = [
                (key, v.replace(params["/".join(("layers", *map(str, key)))])) for key, v in nnx.to_flat_state(state)
            ]
            x, terms, entropies = batch["inputs"], 0.0, 0.0
            for layer in nnx.merge(graphdef, nnx.from_flat_state(flat)):
                x, sown, seen = nnx.capture(layer, meshpipe.LossTerm, nnx.Intermediate)(x)
                terms += sum(jax.tree.leaves(sown), 0.0)
                entropies += sum(jax.tree.leaves(seen), 0.0)
            loss, weight = experts.loss(x, batch)
            return loss + terms, (loss, terms, entropies, weight)

        return jax.grad(total, has_aux=True)(params)

    rows = [{n: np.split(v, MICROBATCHES)[m] for n, v in BATCH.items()} for m in range(MICROBATCHES)]
    found = [sums(params, row) for row in rows]
    loss, terms, entropies, weight = (float(sum(aux[k] for _, aux in found)) for k in range(4))
    gradients = {path: sum(np.asarray(g[path]) for g, _ in found) / weight for path in params}
    return loss / weight, terms / weight, entropies / MICROBATCHES / 6, gradients


CASES = [
    ("gpipe", 2, 1, 1, "none"),
    ("1f1b", 4, 2, 1, "full"),
    ("1f1b", 2, 2, 1, "layer"),
    ("interleaved-1f1b", 2, 2, 2, "none"),
    ("zb-h1", 4, 1, 1, "none"),
    pytest.param("zb-v", 2, 2, 2, "full", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("schedule", "ranks", "data", "per_rank", "remat"), CASES)
def test_a_term_counts_once(plain, schedule, ranks, data, per_rank, remat):
    loss, term, entropy, expected = plain
    trainer = trainer_of(ranks, data, schedule=schedule, stages_per_rank=per_rank, remat=remat)
    found, gradients = trainer.loss_and_gradients(BATCH)
    assert float(found) == pytest.approx(loss, rel=1e-5)
    for path, gradient in expected.items():
        np.testing.assert_allclose(gradients[path], gradient, rtol=2e-4, atol=1e-5, err_msg=path)
    result = trainer.step(BATCH)
    assert float(result.loss) == pytest.approx(loss, rel=1e-5)
    assert {name: float(value) for name, value in result.terms.items()} == pytest.approx({"balance": term}, rel=1e-5)
    assert {n: float(v) for n, v in result.metrics.items()} == pytest.approx({"entropy": entropy}, rel=1e-5)


@pytest.mark.slow
def test_schedules_and_fusion_of_the_last_stage_change_no_bit():
    """On the same cut. Terms of all stages, and their gradients."""
    found = []
    for schedule, target in (("gpipe", None), ("1f1b", None), ("1f1b", ACCELERATOR)):
        config = PipelineConfig(num_microbatches=MICROBATCHES, schedule=schedule)
        trainer = Trainer(
            LAYERS, experts.loss, optax.sgd(0.1), batch=BATCH, mesh=make_mesh(4), pipeline=config, target=target
        )
        result = trainer.step(BATCH)
        scalars = [float(v).hex() for v in (result.loss, result.terms["balance"], result.metrics["entropy"])]
        found.append((scalars, {path: np.asarray(value) for path, value in trainer.params.items()}))
    assert found[0][0] == found[1][0]
    for path, value in found[0][1].items():
        np.testing.assert_array_equal(found[1][1][path], value, err_msg=path)
        np.testing.assert_allclose(found[2][1][path], value, rtol=1e-4, atol=1e-6, err_msg=path)
    assert [float.fromhex(v) for v in found[2][0]] == pytest.approx([float.fromhex(v) for v in found[0][0]])
