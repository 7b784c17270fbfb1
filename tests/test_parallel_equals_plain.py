"""The contract: whatever the schedule, mesh, remat policy and number of microbatches, a step is the plain one."""

import itertools
import random

import jax
import numpy as np
import optax
import pytest
import small_model
from reference import SEED, Reference

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.models import LanguageModelConfig, TextClassifierConfig
from meshpipe.plan.schedules import SCHEDULES
from meshpipe.stage.target import ACCELERATOR

EPSILON = float(np.finfo(np.float32).eps)
LOSS_TOLERANCE = 32 * EPSILON
"""Relative. Sums over a batch are taken in another order."""
LEAF_TOLERANCE = 256 * EPSILON
"""Relative to the largest value of a leaf, or to a hundredth of the largest of all leaves."""
UPDATES = 3
MESHES = [(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (2, 2, 2)]


def optimizer() -> optax.GradientTransformation:
    """Momentum and decay; nothing that divides a gradient by its own size, which blows rounding errors up."""
    return optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))


def text_model():
    config = TextClassifierConfig(d_model=16, num_heads=2, num_classes=4)
    rng = np.random.default_rng(1)
    rows = [
        {
            "inputs": rng.integers(0, 256, (16, 12)).astype(np.int32),
            "labels": rng.integers(0, 4, 16).astype(np.int32),
        }
        for _ in range(UPDATES)
    ]
    return config.layers(), config.loss, rows, ()


def language_model(tie_embedding=False):
    config = LanguageModelConfig(
        d_model=16, num_blocks=2, num_heads=4, num_kv_heads=2, d_hidden=24, vocab_size=32, tie_embedding=tie_embedding
    )
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(UPDATES):
        weights = (rng.uniform(size=(16, 10)) < 0.6).astype(np.float32)
        weights[:2] = 0  # with 8 microbatches, one in which nothing counts
        rows.append(
            {
                "inputs": rng.integers(0, 32, (16, 10)).astype(np.int32),
                "targets": rng.integers(0, 32, (16, 10)).astype(np.int32),
                "segment_ids": np.sort(rng.integers(0, 3, (16, 10)), axis=1).astype(np.int32),
                "weights": weights,
            }
        )
    return config.layers(), config.loss, rows, config.tied()


def tied_language_model():
    return language_model(tie_embedding=True)


def small():
    return small_model.LAYERS, small_model.loss, small_model.batches(UPDATES), ()


def compare(model, mesh, num_microbatches, target=None, **pipeline):
    layers, loss, rows, tied = model()
    trainer = Trainer(
        layers,
        loss,
        optimizer(),
        batch=rows[0],
        mesh=make_mesh(*mesh),
        pipeline=PipelineConfig(num_microbatches=num_microbatches, **pipeline),
        seed=SEED,
        tied=tied,
        target=target,
    )
    plain = Reference(
        layers, loss, optimizer(), jax.device_get(trainer.params), num_microbatches=num_microbatches, tied=tied
    )
    for row in rows:
        found_loss, found = trainer.loss_and_gradients(row)
        result = trainer.step(row)
        trainer.check(result)
        expected_loss, expected = plain.step(row)
        assert float(found_loss) == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
        assert float(result.loss) == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
        assert float(result.grad_norm) == pytest.approx(float(optax.global_norm(expected)), rel=LEAF_TOLERANCE)
        assert_close(found, expected)
    params = trainer.params
    assert_close({path: params[path] for path in plain.params}, plain.params)
    for path, owner in plain.owner.items():
        np.testing.assert_array_equal(params[path], params[owner])
    assert_close(trainer.state, {plain.path(k): v.get_value() for k, v in plain_state(plain)})
    return trainer


def plain_state(plain):
    from flax import nnx

    return nnx.to_flat_state(plain.state)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    largest = max((float(np.abs(leaf).max()) for leaf in map(np.asarray, expected.values())), default=0.0)
    for path, leaf in expected.items():
        a, b = np.asarray(found[path], np.float64), np.asarray(leaf, np.float64)
        allowed = LEAF_TOLERANCE * max(np.abs(b).max(), 0.01 * largest)
        assert np.abs(a - b).max() <= allowed, f"{path} differs by {np.abs(a - b).max():.3g}, {allowed:.3g} allowed"


@pytest.mark.parametrize(
    ("model", "schedule", "remat", "mesh", "num_microbatches"),
    [
        pytest.param(text_model, "1f1b", "none", (4, 1, 1), 8, marks=pytest.mark.slow),
        pytest.param(text_model, "gpipe", "full", (2, 2, 2), 4, marks=pytest.mark.slow),
        pytest.param(text_model, "1f1b", "full", (1, 2, 1), 1, marks=pytest.mark.slow),
        (language_model, "1f1b", "none", (2, 2, 1), 8),
        (language_model, "gpipe", "none", (1, 1, 2), 2),
        pytest.param(tied_language_model, "1f1b", "full", (4, 1, 2), 4, marks=pytest.mark.slow),
        (small, "1f1b", "none", (1, 1, 1), 4),
        (small, "1f1b", "full", (2, 1, 2), 4),
        (small, "gpipe", "none", (4, 2, 1), 2),  # fewer microbatches than stages
        (small, "zb-h1", "none", (4, 1, 1), 4),
        (small, "zb-v", "layer", (2, 1, 1), 4),
        pytest.param(language_model, "1f1b", "layers/1-2=full", (2, 2, 1), 4, marks=pytest.mark.slow),
        pytest.param(tied_language_model, "zb-h1", "layer", (2, 1, 2), 4, marks=pytest.mark.slow),
        pytest.param(tied_language_model, "zb-h1", "full", (2, 1, 1), 4, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_the_plain_one(model, schedule, remat, mesh, num_microbatches):
    compare(model, mesh, num_microbatches, schedule=schedule, remat=remat)


@pytest.mark.parametrize(
    ("model", "remat", "mesh", "num_microbatches"),
    [
        pytest.param(text_model, "none", (1, 2, 1), 4, marks=pytest.mark.slow),
        (tied_language_model, "none", (2, 1, 1), 4),
        pytest.param(language_model, "dots_saveable", (2, 1, 1), 2, marks=pytest.mark.slow),
        (small, "full", (2, 2, 1), 4),
        (small, "layer", (1, 2, 1), 4),
    ],
)
def test_a_step_as_accelerators_take_it(model, remat, mesh, num_microbatches):
    """They repeat more of forward, and have one program for forward and backward of the last stage."""
    trainer = compare(model, mesh, num_microbatches, target=ACCELERATOR, schedule="1f1b", remat=remat)
    assert [s for s, programs in trainer.model.programs.items() if programs.forward_backward is not None] == [
        mesh[0] - 1
    ]
    policy = getattr(jax.checkpoint_policies, remat, None)
    assert {stage.spec.checkpoint_policy for stage in trainer.model.traced.values()} == {policy}


def product():
    """Every model on every mesh, the small one twice, with schedule, remat policy and microbatches drawn by a seed."""
    draw = random.Random(0)
    options = list(itertools.product(("gpipe", "1f1b"), ("none", "layer", "full"), (1, 2, 4)))
    models = (text_model, language_model, small)
    return [
        (model, schedule, remat, mesh, count)
        for model, mesh in itertools.product(models, MESHES)
        for schedule, remat, count in draw.sample(options, 2 if model is small else 1)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "schedule", "remat", "mesh", "num_microbatches"), product())
def test_every_combination(model, schedule, remat, mesh, num_microbatches):
    compare(model, mesh, num_microbatches, schedule=schedule, remat=remat)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "inference"])
def test_every_schedule(schedule, remat):
    compare(small, (2, 1, 1), 4, schedule=schedule, remat=remat)
