"""Frozen parameters: no gradient, no state of the optimizer, and no backward where nothing before is trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import meshpipe
from meshpipe import PipelineConfig, Trainer, make_mesh, verify
from meshpipe.plan.plan import Op
from meshpipe.sharding import FULLY_SHARDED

WIDTH = 8
ROWS = {"inputs": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}
SPLIT = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", None))


class Adapted(nnx.Module):
    """A base in bfloat16 with an adapter."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, param_dtype=jnp.bfloat16, rngs=rngs)
        self.lora = nnx.LoRA(WIDTH, 2, WIDTH, b_initializer=nnx.initializers.normal(0.1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(x) + self.lora(x))


def dense(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(WIDTH, WIDTH, kernel_init=SPLIT, rngs=rngs)


def loss(output: jax.Array, batch: Any) -> Any:
    return ((output - 1) ** 2).sum(), output.size


def trainer(layers: Any, optimizer: Any = None, mesh: Any = None, schedule: str = "1f1b", **changes: Any) -> Trainer:
    pipeline = PipelineConfig(num_microbatches=4, schedule=schedule)
    adam = optax.adamw(1e-2, weight_decay=0.1)
    arguments = {"batch": ROWS, "mesh": make_mesh(2) if mesh is None else mesh, "pipeline": pipeline, **changes}
    return Trainer(layers, loss, adam if optimizer is None else optimizer, **arguments)


@pytest.fixture(scope="module")
def adapted() -> Trainer:
    return trainer([Adapted, Adapted], clip_norm=0.01)


def test_only_what_is_trained_has_gradients_and_state_and_moves(adapted: Trainer) -> None:
    adapters = {f"layers/{layer}/lora/{name}" for layer in (0, 1) for name in ("lora_a", "lora_b")}
    before = jax.tree.map(np.asarray, adapted.params)
    _, gradients = adapted.loss_and_gradients(ROWS)
    assert gradients.keys() == adapters
    result = adapted.step(ROWS)
    norm = np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in gradients.values()))
    assert float(result.grad_norm) == pytest.approx(norm, rel=1e-5)
    for path, leaf in adapted.params.items():
        assert np.array_equal(leaf, before[path]) == (path not in adapters)
        assert leaf.dtype == (jnp.float32 if path in adapters else jnp.bfloat16)
    of_optimizer = [path for tree in adapted.state_tree() for path in tree["optimizer"] if "layers" in path]
    assert len(of_optimizer) == 2 * len(adapters)
    for stage in adapted.model.traced.values():
        assert stage.params == tuple(stage.spec.params.values())
        assert all("lora" in path for path in stage.spec.params)


def test_counts_and_notes_tell_what_is_trained(adapted: Trainer) -> None:
    assert adapted.notes == ("Training 4 of 8 arrays, 64 of 208 parameters: lora_a, lora_b.",)
    assert [(stage.parameter_count, stage.trained_count) for stage in adapted.stages] == [(104, 32)] * 2


def test_a_note_says_which_gradients_the_optimizer_never_uses() -> None:
    def labels(params: Any) -> Any:
        return {path: "moved" if "layers/1" in path else "kept" for path in params}

    made = trainer([dense] * 2, optax.multi_transform({"moved": optax.sgd(1.0), "kept": optax.set_to_zero()}, labels))
    assert made.notes == (
        "Training all 4 arrays, 144 parameters.",
        "The optimizer never uses the gradients of 2 of these arrays, 72 parameters: layers/0. "
        "Leave them out of `trainable`, and their gradients are not computed.",
    )


def test_modules_and_update_have_frozen_values_too(adapted: Trainer) -> None:
    layers = adapted.modules()
    np.testing.assert_array_equal(layers[1].linear.kernel[...], adapted.params["layers/1/linear/kernel"])
    x = jnp.asarray(ROWS["inputs"])
    np.testing.assert_allclose(layers[1](layers[0](x)), adapted.predict(ROWS), rtol=1e-5, atol=1e-6)
    fresh = [Adapted(nnx.Rngs(7)), Adapted(nnx.Rngs(8))]
    adapted.update(fresh)
    np.testing.assert_array_equal(fresh[0].linear.kernel[...], adapted.params["layers/0/linear/kernel"])
    np.testing.assert_array_equal(fresh[0].lora.lora_b[...], adapted.params["layers/0/lora/lora_b"])


def test_stages_before_the_first_trained_one_run_no_backward() -> None:
    frozen = trainer([dense] * 4, mesh=make_mesh(4), trainable="layers/2")
    backward = {action.stage for action in frozen.plan.actions if action.op is not Op.FORWARD}
    assert backward == {2, 3}
    assert [bool(stage.pullback_vars) for stage in frozen.model.traced.values()] == [False, False, True, True]
    assert [len(stage.x_gradients) for stage in frozen.model.traced.values()] == [0, 0, 0, 1]
    assert [frozen.model.programs[s].backward is None for s in range(4)] == [True, True, False, False]
    measured = frozen.step(ROWS, measure=True).measured
    assert measured is not None
    timed = {action.stage for action in measured.timeline.starts if action.op is not Op.FORWARD}
    assert timed == {2, 3}


@pytest.mark.parametrize(
    ("schedule", "mesh", "trainable", "rules"),
    [
        ("zb-h1", (2, 1), ["layers/2", "layers/1/bias"], None),
        ("1f1b", (2, 2), ["kernel", "!layers/3"], FULLY_SHARDED),
        pytest.param("interleaved-1f1b", (2, 1), "layers/1", None, marks=pytest.mark.slow),
    ],
)
def test_verify_holds_with_frozen_parts(schedule: str, mesh: Any, trainable: Any, rules: Any) -> None:
    report = verify(
        [dense] * 4,
        loss,
        optax.adamw(1e-2, weight_decay=0.1),
        batches=[ROWS, ROWS],
        mesh=make_mesh(*mesh),
        pipeline=PipelineConfig(num_microbatches=4, schedule=schedule),
        clip_norm=0.1,
        trainable=trainable,
        rules=rules,
    )
    assert report.ok, report.first


def test_frozen_parameters_are_gathered_once_per_step() -> None:
    made = trainer([dense, dense], mesh=make_mesh(1, 2), trainable="layers/1", rules=FULLY_SHARDED)
    (stage,) = made.model.traced.values()
    kernel = made.params["layers/0/kernel"]
    assert kernel.addressable_shards[0].data.shape == (WIDTH // 2, WIDTH)
    assert "layers/0/kernel" in stage.fixed_paths
    assert [v.aval.shape for v in stage.prepared_vars].count((WIDTH, WIDTH)) == 2  # both kernels, each once
    made.step(ROWS)
    assert made.params["layers/0/kernel"].sharding == kernel.sharding


def test_tied_frozen_parameters_have_their_owners_value() -> None:
    group = ("layers/0/kernel", "layers/3/kernel")
    made = trainer([dense] * 4, tied=[group], trainable=["layers/1", "layers/2"])
    np.testing.assert_array_equal(made.params[group[0]], made.params[group[1]])
    trees = jax.tree.map(jnp.copy, made.state_tree())
    trees[1]["params"][group[1]] = trees[1]["params"][group[1]] + 1
    made.load_state_tree(trees, 0)
    np.testing.assert_array_equal(made.params[group[0]], made.params[group[1]])
    assert set(made.loss_and_gradients(ROWS)[1]) == {
        f"layers/{i}/{name}" for i in (1, 2) for name in ("bias", "kernel")
    }


def test_a_checkpoint_does_not_depend_on_what_is_trained() -> None:
    whole, part = trainer([dense] * 2), trainer([dense] * 2, trainable="layers/1")
    assert [tree["params"].keys() for tree in whole.state_tree()] == [t["params"].keys() for t in part.state_tree()]
    whole.step(ROWS)
    trees = whole.state_tree()
    with pytest.raises(ValueError, match=r"must belong to the parameters that are trained. Only the restored one has"):
        part.load_state_tree(trees, 1)
    part.load_state_tree([{name: tree[name] for name in ("params", "state")} for tree in trees], 1)
    for path, leaf in whole.params.items():
        np.testing.assert_array_equal(leaf, part.params[path])


def test_a_call_must_not_write_to_a_frozen_parameter() -> None:
    class Writes(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.scale[...] = self.scale[...] + 1
            return x

    with pytest.raises(ValueError, match=r"Parameters are changed by the optimizer alone. layers/0 \(Writes\)"):
        trainer([Writes, dense], trainable="layers/1")


def test_optax_masks_and_partitions_work_on_what_is_trained() -> None:
    """Each moves its own parameters; weight decay reaches none that is masked or frozen."""
    optimizer = optax.chain(
        optax.masked(
            optax.add_decayed_weights(1.0), lambda params: {path: leaf.ndim > 1 for path, leaf in params.items()}
        ),
        optax.partition(
            {"fast": optax.sgd(1.0), "slow": optax.sgd(0.01)},
            lambda params: {path: "fast" if "bias" in path else "slow" for path in params},
        ),
    )
    report = meshpipe.verify(
        [dense] * 2,
        loss,
        optimizer,
        batches=[ROWS],
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=4),
        trainable="!layers/0/bias",
    )
    assert report.ok, report.first
