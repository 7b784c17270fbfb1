"""The predicted memory of a rank is what its arrays take."""

import gc
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_recipes
from benchmarks.live_bytes import measure_peaks
from flax import nnx
from staged import staged

from meshpipe.adapters.lora import lora
from meshpipe.choose.memory import RankMemory, predict_memory, stage_memory
from meshpipe.choose.remat import choose_remat
from meshpipe.config import Config
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.mesh import MeshConfig, make_mesh
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.runs.build import make_chooser, make_trainer
from meshpipe.sharding import FULLY_SHARDED, ShardingRules


def predict(config: Config) -> list[RankMemory]:
    return predict_memory(make_chooser(config).choose(), config.optimizer.build(config.steps))


def on_device(leaves: object, device: jax.Device) -> int:
    """Bytes of arrays that one device holds."""
    shards = (shard for leaf in jax.tree.leaves(leaves) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_parameters_and_optimizer_are_exact() -> None:
    config = tiny_recipes.pipeline()
    trainer = make_trainer(config)
    trees = trainer.state_tree()
    for memory in predict(config):
        device = trainer.mesh.devices[memory.rank].flat[0]
        assert memory.parameters == on_device([tree["params"] for tree in trees], device)
        assert memory.optimizer == on_device([tree["optimizer"] for tree in trees], device)
        assert memory.gradients == memory.parameters  # float32, as the parameters are


def test_activations_of_dense_layers() -> None:
    # Of each layer, backward needs y = tanh(...), from which its derivative follows: 4 examples of 8 float32 are 128
    # bytes. What the first layer reads is in the batch already. At the peak another output of as many bytes is on its
    # way, or its gradient.
    first, last = predict(tiny_recipes.pipeline())
    assert (first.live_activations, last.live_activations) == (2, 1)
    assert first.activations == 2 * (2 * 128) + 128
    # The input that came from the other rank, and at least the probabilities that the loss's gradient is made of.
    assert last.activations >= 128 + 2 * 2 * 128 + 128


def test_data_splits_activations_and_remat_saves_them() -> None:
    config = replace(tiny_recipes.single(), model=tiny_recipes.DenseConfig(depth=12))
    (plain,) = predict(config)
    (split,) = predict(replace(config, mesh=MeshConfig(data=2)))
    assert split.activations == plain.activations // 2
    assert split.batch == plain.batch // 2
    assert split.parameters == plain.parameters
    four = replace(config, pipeline=PipelineConfig(num_microbatches=4, schedule="gpipe"))
    (kept,) = predict(four)
    (recomputed,) = predict(replace(four, pipeline=replace(four.pipeline, remat="full")))
    assert kept.live_activations == recomputed.live_activations == 4
    assert recomputed.activations < kept.activations / 2


def test_the_sum_is_the_sum() -> None:
    (memory,) = predict(tiny_recipes.single())
    parts = (memory.parameters, memory.gradients, memory.optimizer, memory.batch, memory.activations)
    assert memory.total == sum(parts)


class Plain(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(jnp.sin(self.linear(x)))


class Recomputed(nnx.Module):
    """The same with nothing kept of its inside."""

    def __init__(self, rngs: nnx.Rngs):
        self.plain = Plain(rngs)

    @nnx.remat
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.plain(x)


class Looped(nnx.Module):
    """Three layers in one `scan`, whose residuals are stacked."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernels = nnx.Param(0.3 * rngs.params.normal((3, 8, 8)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, kernel: (x + jnp.tanh(jnp.sin(x @ kernel)), None), x, self.kernels[...])[0]


class Frozen(nnx.Module):
    """A matrix that is not trained, used in bfloat16, a mask, and a count that forward changes."""

    def __init__(self, rngs: nnx.Rngs):
        self.base = nnx.Variable(0.3 * rngs.params.normal((8, 8)))
        self.mask = nnx.Variable(jnp.arange(8) % 2 == 0)
        self.count = nnx.BatchStat(jnp.zeros((8,)))
        self.scale = nnx.Param(jnp.ones((8,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.count[...] += 1
        y = jnp.sin(x.astype(jnp.bfloat16) @ self.base[...].astype(jnp.bfloat16)).astype(x.dtype)
        return jnp.where(self.mask[...], x, y * self.scale[...])


class Split(nnx.Module):
    """A matrix that fully sharded data parallelism splits, used in bfloat16."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", None))
        self.linear = nnx.Linear(8, 8, kernel_init=init, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.linear(x)).astype(x.dtype)


ADAPTED: Any = lora([Plain], rank=2)[0]
"""A frozen layer with an adapter: only that has gradients and optimizer state."""


def made(
    layer: Any, data: int = 1, rules: ShardingRules | None = None, **pipeline: Any
) -> tuple[StagedModel, dict[str, np.ndarray]]:
    batch = {"inputs": np.ones((64, 8), np.float32)}
    config = PipelineConfig(**{"num_microbatches": 4, **pipeline})

    def loss(output: jax.Array, batch: Any) -> Any:
        return (output**2).sum(), jnp.float32(output.size)

    mesh = make_mesh(2, data)
    model = staged(Task([layer] * 4, loss, batch=batch, rules=rules or ShardingRules()), mesh, config)
    return model, batch


@pytest.mark.parametrize(
    ("layer", "pipeline"),
    [
        (Plain, {"schedule": "1f1b", "remat": "full,none"}),
        (Plain, {"schedule": "zb-h1"}),
        (Plain, {"schedule": "gpipe", "remat": "layer"}),
        (Plain, {"schedule": "zb-v", "remat": "layers/1-2=full"}),
        (Plain, {"schedule": "interleaved-1f1b"}),
        (Recomputed, {"schedule": "gpipe"}),
        (Looped, {"schedule": "1f1b"}),
        (Frozen, {"schedule": "gpipe"}),
        (Frozen, {"schedule": "zb-h1", "remat": "none,full"}),
        (Frozen, {"schedule": "zb-h1", "remat": "layer"}),
        (ADAPTED, {"schedule": "1f1b"}),
        (ADAPTED, {"schedule": "zb-h1"}),
    ],
)
def test_the_peak_is_what_is_measured(layer: Any, pipeline: dict[str, str]) -> None:
    model, batch = made(layer, **pipeline)
    transformation = optax.sgd(0.1, momentum=0.9)
    predicted = predict_memory(model, transformation)
    measured = measure_peaks(model, transformation, batch)
    for rank, peak in zip(predicted, measured, strict=True):
        # All is counted but a few scalars of the executor and the optimizer.
        assert rank.arrays <= peak <= rank.arrays + 100
        assert rank.activations > 2000


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_frozen_early_stages_hold_weights_and_what_is_on_its_way(schedule: str) -> None:
    """Their ranks have no gradient, no moment and no residual; the prediction is within 2 % of what is measured."""
    batch = {"inputs": np.ones((64, 64), np.float32)}
    config = PipelineConfig(num_microbatches=4, schedule=schedule)

    def wide(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Linear(64, 64, rngs=rngs)

    def loss(output: jax.Array, batch: Any) -> Any:
        return (jnp.tanh(output) ** 2).sum(), jnp.float32(output.size)

    model = staged(Task([wide] * 4, loss, batch=batch, trainable="layers/3/kernel"), make_mesh(2), config)
    transformation = optax.adam(0.1)
    first, last = predict_memory(model, transformation)
    layer = (64 * 64 + 64) * 4
    assert (first.parameters, first.gradients, first.live_activations) == (2 * layer, 0, 0)
    assert (last.parameters, last.gradients) == (2 * layer, 64 * 64 * 4)
    assert first.optimizer < 100
    assert abs(last.optimizer - 2 * 64 * 64 * 4) < 100
    for rank, peak in zip((first, last), measure_peaks(model, transformation, batch), strict=True):
        assert rank.arrays <= peak <= 1.02 * rank.arrays


def test_a_frozen_base_has_neither_gradients_nor_optimizer_state() -> None:
    model, _ = made(ADAPTED)
    for rank in predict_memory(model, optax.adam(0.1)):
        base, adapters = 2 * (8 * 8 + 8) * 4, 2 * (8 * 2 + 2 * 8) * 4
        assert rank.parameters == base + adapters
        assert rank.gradients == adapters
        assert rank.optimizer == 2 * adapters + 4


def test_split_parameters_are_whole_while_a_step_runs() -> None:
    """And so are their gradients; what is kept between steps is split."""
    transformation = optax.adam(0.1)
    model, batch = made(Split, data=2, rules=FULLY_SHARDED)
    whole, _ = made(Split, data=2)
    predicted, unsplit = predict_memory(model, transformation), predict_memory(whole, transformation)
    measured = measure_peaks(model, transformation, batch)
    for rank, other, peak in zip(predicted, unsplit, measured, strict=True):
        assert rank.total <= peak <= rank.total + 100
        kernels = 2 * 8 * 8 * 4
        assert other.parameters - rank.parameters == kernels // 2
        assert other.gradients == rank.gradients
        assert other.optimizer - rank.optimizer == kernels


def test_layers_that_keep_nothing_of_their_inside_predict_less() -> None:
    transformation = optax.sgd(0.1)
    plain, recomputed = (predict_memory(made(layer)[0], transformation) for layer in (Plain, Recomputed))
    assert recomputed[0].activations < plain[0].activations / 2


def test_residuals_of_a_loop_are_those_of_each_turn() -> None:
    """Of each of 3 layers at least the argument of each function, 16 rows of 8 float32; for 2 live microbatches."""
    (first, _) = predict_memory(made(Looped)[0], optax.sgd(0.1))
    assert first.live_activations == 2
    assert first.activations >= 2 * 2 * 3 * 2 * (16 * 8 * 4)


@pytest.mark.parametrize("layer", [Plain, Frozen])
def test_predicting_allocates_and_moves_nothing(layer: type[nnx.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("a transfer was made ready")

    for user in ("optimizer.optimizer", "optimizer.tied", "pipeline.executor"):
        monkeypatch.setattr(f"meshpipe.{user}.transfer_between", fail)
    gc.collect()
    before = {id(array): array for array in jax.live_arrays()}
    with jax.transfer_guard("disallow_explicit"):
        model, _ = made(layer, schedule="1f1b")
        predict_memory(model, optax.adamw(0.1))
        stage_memory(model, optax.adamw(0.1))
        choose_remat(model, optax.adamw(0.1), 10**9)
    assert [array.shape for array in jax.live_arrays() if id(array) not in before] == []


def test_an_optimizer_that_no_stage_can_run_alone_is_refused_in_predictions() -> None:
    model, _ = made(Plain)
    with pytest.raises(ValueError, match="must update each parameter from its own gradient"):
        predict_memory(model, optax.clip_by_global_norm(1.0))


class Wide(nnx.Module):
    """A perceptron whose hidden units are many times its input."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 64, rngs=rngs)
        self.down = nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.sin(jnp.tanh(self.up(x))))


@pytest.mark.parametrize("data", [1, 2])
def test_xla_recomputes_one_layer_at_a_time(data: int) -> None:
    """By the temporary memory of its compiled programs, which the prediction is an estimate of."""
    temporary, predicted = {}, {}
    for remat in ("layer", "nothing_saveable"):
        batch = {"inputs": np.ones((2 * 1024, 8), np.float32)}
        config = PipelineConfig(num_microbatches=2, remat=remat)
        task = Task([Wide] * 24, lambda output, batch: ((output**2).sum(), output.size), batch=batch)
        model = staged(task, make_mesh(2, data), config)
        _, predicted[remat] = (rank.temporaries for rank in predict_memory(model, optax.sgd(0.1)))
        assert len(model.trace()[1].residual_vars) == (11 if remat == "layer" else 0)  # and one from rank 0
        model.compile()
        temporary[remat] = model.programs[1].backward.memory_analysis().temp_size_in_bytes  # type: ignore[union-attr]
    hidden = 1024 // data * 64 * 4
    assert hidden <= predicted["layer"] <= 5 * hidden
    assert predicted["nothing_saveable"] > 4 * predicted["layer"]
    for remat in temporary:
        assert 0.8 * predicted[remat] <= temporary[remat] <= 2.5 * predicted[remat]
    assert temporary["nothing_saveable"] > 4 * temporary["layer"]
