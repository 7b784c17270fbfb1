"""Layers of unusual kinds train through a pipeline as they do alone: one model of them all, against plain NNX."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from reference import SEED, Reference

from meshpipe import PipelineConfig, Trainer, make_mesh

WIDTH, ROWS, MICROBATCHES = 4, 8, 2
TOLERANCE = 256 * float(np.finfo(np.float32).eps)
"""Relative to the largest value of a leaf."""


class Spread(nnx.Module):
    """Returns nested values: floating and integer arrays, bfloat16, a number and nothing."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> dict[str, Any]:
        largest = jnp.argmax(inputs, axis=-1)
        return {"x": self.linear(inputs), "rest": (largest, inputs.astype(jnp.bfloat16), 0.5, None), "none": ()}


class Collect(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, value: dict[str, Any]) -> jax.Array:
        largest, half, factor, nothing = value["rest"]
        assert nothing is None
        return value["x"] + self.embed(largest) * factor + half.astype(jnp.float32)


class Several(nnx.Module):
    """Modules in a list and in a dictionary."""

    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.named = nnx.Dict({"out": nnx.Linear(WIDTH, WIDTH, rngs=rngs)})

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.named["out"](x)


class Scanned(nnx.Module):
    """Three blocks with stacked parameters, made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.blocks = make(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block: nnx.Linear, x: jax.Array) -> jax.Array:
            return jnp.tanh(block(x))

        return run(self.blocks, x)


class Rematerialised(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    @nnx.remat
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


@jax.custom_vjp
def reversed_gradient(x: jax.Array, factor: float) -> jax.Array:
    return x


reversed_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, gradient: (-factor * gradient, None))


class Adversary(nnx.Module):
    """A derivative of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, shift: jax.Array) -> jax.Array:
        return reversed_gradient(self.linear(x), 0.5) + shift[:, None]


class Talkative(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        jax.debug.print("{} rows went by", x.shape[0])
        return self.linear(x)


class Frozen(nnx.Variable[jax.Array]):
    pass


class Fixed(nnx.Module):
    """A variable that is no parameter: never trained, never changed."""

    def __init__(self, rngs: nnx.Rngs):
        self.matrix = Frozen(jnp.arange(WIDTH * WIDTH, dtype=jnp.float32).reshape(WIDTH, WIDTH) / 8)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.matrix[...]


class Bend(nnx.Module):
    """No parameters and no arguments."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x)


READY = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(7))
LAYERS: list[Any] = [
    Spread,
    *(Collect, Several, Scanned, Rematerialised, READY),
    Bend,
    *(Adversary, Talkative, Fixed, functools.partial(nnx.Linear, WIDTH, WIDTH)),
]
FIRST_LAYERS = "0,1,6,7"
"""The nested value crosses from stage 0 to 1; stage 2 has no parameters."""


def loss(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return ((output - batch["target"]) ** 2).sum(), jnp.float32(output.size)


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {"inputs": (ROWS, WIDTH), "shift": (ROWS,), "target": (ROWS, WIDTH)}
    return [{name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()} for _ in range(count)]


def optimizer() -> optax.GradientTransformation:
    return optax.sgd(0.05, momentum=0.9)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return Trainer(
        LAYERS,
        loss,
        optimizer(),
        batch=batches(1)[0],
        mesh=make_mesh(4),
        pipeline=PipelineConfig(num_microbatches=MICROBATCHES, partition=FIRST_LAYERS),
        seed=SEED,
    )


def plain(layer: Any) -> Any:
    """As the reference makes them: from a constructor that takes `rngs`."""
    if isinstance(layer, nnx.Module):
        return lambda rngs: nnx.clone(layer)
    return (lambda rngs: layer()) if layer is Bend else layer


def test_they_train_as_they_do_alone(trainer: Trainer, capfd: pytest.CaptureFixture[str]) -> None:
    reference = Reference([plain(layer) for layer in LAYERS], loss, optimizer(), jax.device_get(trainer.params))
    before = {path: np.asarray(leaf) for path, leaf in nnx_leaves(READY).items()}
    for path, value in before.items():
        np.testing.assert_array_equal(trainer.params[f"layers/5/{path}"], value)

    for row in batches(2):
        result = trainer.step(row)
        jax.block_until_ready(result.loss)
        jax.effects_barrier()
        assert capfd.readouterr().out.count("4 rows went by") == MICROBATCHES
        expected, _ = reference.step(row)
        capfd.readouterr()
        assert float(result.loss) == pytest.approx(expected, rel=TOLERANCE)

    for path, leaf in reference.params.items():
        found = np.asarray(trainer.params[path])
        assert np.abs(found - leaf).max() <= TOLERANCE * max(np.abs(leaf).max(), 0.01), path
    assert not np.array_equal(trainer.params["layers/5/kernel"], before["kernel"])
    for path, leaf in nnx_leaves(READY).items():  # the user's module is whole and as it was
        np.testing.assert_array_equal(leaf, before[path])
    assert READY(np.ones((2, WIDTH), np.float32)).shape == (2, WIDTH)


def test_what_is_no_parameter_stays(trainer: Trainer) -> None:
    assert "layers/9/matrix" not in trainer.params
    np.testing.assert_array_equal(trainer.state["layers/9/matrix"].ravel(), np.arange(16, dtype=np.float32) / 8)


def test_stages_are_as_asked_for(trainer: Trainer) -> None:
    assert [stage.layers for stage in trainer.stages] == [range(1), range(1, 6), range(6, 7), range(7, 11)]
    assert [stage.parameter_count for stage in trainer.stages] == [20, 16 + 60 + 60 + 76 + 20, 0, 60]
    (boundary,) = trainer.model.traced[0].boundaries_out
    assert len(boundary.leaves) == 4
    assert len(boundary.differentiable) == 3


def nnx_leaves(module: nnx.Module) -> dict[str, jax.Array]:
    return {"/".join(map(str, key)): leaf.get_value() for key, leaf in nnx.to_flat_state(nnx.state(module))}


class Idle(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.unused = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(x))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_parameter_that_is_not_used_has_no_gradient(schedule: str) -> None:
    batch = {"inputs": np.ones((ROWS, WIDTH), np.float32)}
    pipeline = PipelineConfig(schedule=schedule, num_microbatches=MICROBATCHES)
    trainer = Trainer(
        [Idle] * 2,
        lambda output, batch: (output.sum(), output.size),
        optax.sgd(0.1),
        batch=batch,
        mesh=make_mesh(2, 2),
        pipeline=pipeline,
    )
    _, gradients = trainer.loss_and_gradients(batch)
    for layer in range(2):
        assert gradients[f"layers/{layer}/unused"] == 0
        assert np.any(gradients[f"layers/{layer}/linear/kernel"])


class Mapped(nnx.Module):
    """A product that every device of the data axis does for itself, where there is one."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        def multiply(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return jnp.tanh(x @ kernel)

        if "data" in jax.sharding.get_abstract_mesh().axis_names:
            multiply = jax.shard_map(
                multiply, in_specs=(PartitionSpec("data"), PartitionSpec()), out_specs=PartitionSpec("data")
            )
        return multiply(x, self.linear.kernel[...])


def test_a_layer_under_shard_map_trains_as_it_does_alone() -> None:
    row = batches(1)[0]
    layers = [Mapped] * 2
    pipeline = PipelineConfig(num_microbatches=MICROBATCHES)
    trainer = Trainer(layers, loss, optimizer(), batch=row, mesh=make_mesh(2, 2), pipeline=pipeline, seed=SEED)
    reference = Reference(layers, loss, optimizer(), jax.device_get(trainer.params))
    _, found = trainer.loss_and_gradients(row)
    _, expected = reference.step(row)
    for path, gradient in expected.items():
        assert np.abs(np.asarray(found[path]) - gradient).max() <= TOLERANCE * max(np.abs(gradient).max(), 0.01), path
