"""The user's modules with the trained values: new ones, and those that were given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import meshpipe
from meshpipe import PipelineConfig, Trainer, make_mesh

BATCH = {"inputs": np.arange(8, dtype=np.int32), "labels": np.arange(8, dtype=np.int32)[::-1].copy()}
TIED = ("layers/0/embedding", "layers/3/table/embedding")


class Head(nnx.Module):
    """Scores by the table of the embedding."""

    def __init__(self, table: nnx.Embed):
        self.table = table

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table.attend(x)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.parts = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.scale = nnx.data(np.ones(4))  # no variable, and in float64

    def __call__(self, x: jax.Array) -> jax.Array:
        for part in self.parts:
            x = x + self.drop(part(self.norm(x)))
        return x * self.scale


def layers() -> list[Any]:
    rngs = nnx.Rngs(0)
    table = nnx.Embed(8, 4, rngs=rngs)
    return [table, Block(rngs), nnx.relu, Head(table)]


def loss(output: jax.Array, batch: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"])
    return losses.sum(), losses.size


@pytest.fixture(scope="module")
def given() -> list[Any]:
    return layers()


@pytest.fixture(scope="module")
def trainer(given: list[Any]) -> Trainer:
    made = Trainer(
        given,
        loss,
        optax.adam(0.1),
        batch=BATCH,
        mesh=make_mesh(2, 2),
        pipeline=PipelineConfig(num_microbatches=2),
    )
    for _ in range(3):
        made.step(BATCH)
    return made


def leaves(module: nnx.Module) -> dict[str, Any]:
    flat = nnx.to_flat_state(nnx.state(module))
    values = {
        k: v.get_value() if isinstance(v, nnx.Variable) else v for k, v in flat if not isinstance(v, nnx.RngState)
    }
    return {"/".join(map(str, key)): value for key, value in values.items()}


def assert_values(modules: list[Any], trainer: Trainer) -> None:
    expected = {**trainer.params, **trainer.state}
    found = {f"layers/{i}/{p}": v for i, m in enumerate(modules) if i != 2 for p, v in leaves(m).items()}
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value)


def test_new_modules_have_the_values_and_can_be_called(trainer: Trainer) -> None:
    modules = trainer.modules()
    assert [type(m).__name__ for m in modules] == ["Embed", "Block", "relu", "Head"]
    assert_values(modules, trainer)
    output = nnx.Sequential(*modules)(jnp.asarray(BATCH["inputs"]))
    found = trainer.predict({"inputs": BATCH["inputs"]})
    np.testing.assert_allclose(found, output, rtol=0, atol=64 * np.finfo(np.float32).eps * np.abs(output).max())


def test_what_was_shared_is_one_variable_again(trainer: Trainer) -> None:
    assert trainer.model.tied == (TIED,)
    table, _, _, head = trainer.modules()
    assert head.table.embedding is table.embedding
    named = Trainer(
        [lambda rngs: nnx.Linear(4, 4, rngs=rngs)] * 2,
        lambda output, batch: (output.sum(), 1),
        optax.sgd(0.1),
        batch={"inputs": np.ones((2, 4), np.float32)},
        tied=[("layers/0/kernel", "layers/1/kernel")],
    )
    first, second = named.modules()
    assert first.kernel is second.kernel
    assert first.bias is not second.bias


def test_modules_outlive_the_next_step_and_can_be_trained_further(trainer: Trainer) -> None:
    modules = trainer.modules(train=True)
    before = {path: np.array(value) for path, value in leaves(modules[1]).items()}
    trainer.step(BATCH)
    for path, value in leaves(modules[1]).items():
        np.testing.assert_array_equal(value, before[path])
    model = nnx.Sequential(*modules)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        value, gradients = nnx.value_and_grad(lambda m: loss(m(BATCH["inputs"]), BATCH)[0])(model)
        optimizer.update(model, gradients)
        return value

    losses = [float(step(model, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_they_are_in_the_mode_that_is_asked_for_on_the_device_that_is(trainer: Trainer) -> None:
    device = jax.devices()[5]
    evaluated, trained = trainer.modules(device=device)[1], trainer.modules(train=True)[1]
    assert evaluated.drop.deterministic
    assert evaluated.norm.use_running_average
    assert not trained.drop.deterministic
    assert {d for leaf in jax.tree.leaves(nnx.state(evaluated)) for d in leaf.devices()} == {device}
    assert {d for leaf in jax.tree.leaves(nnx.state(trained)) for d in leaf.devices()} == {jax.devices()[0]}


def test_values_are_written_into_the_modules_that_were_given(trainer: Trainer, given: list[Any]) -> None:
    table = given[0].embedding
    given[1].norm.mean[...] = jax.device_put(given[1].norm.mean[...], jax.devices()[3])
    trainer.update(given)
    assert_values(given, trainer)
    assert given[0].embedding is table is given[3].table.embedding
    assert given[1].norm.mean[...].devices() == {jax.devices()[3]}
    trainer.step(BATCH)
    assert np.isfinite(np.asarray(given[1].norm.mean[...])).all()  # a copy, not what the step donated


def test_modules_of_another_shape_are_refused_before_anything_is_written(trainer: Trainer) -> None:
    other = layers()
    other[3] = Head(nnx.Embed(9, 4, rngs=nnx.Rngs(0)))
    before = np.array(other[1].parts[0].kernel[...])
    with pytest.raises(ValueError, match=r"layers/3/table/embedding is float32\[9, 4\], and float32\[8, 4\]"):
        trainer.update(other)
    np.testing.assert_array_equal(other[1].parts[0].kernel[...], before)
    with pytest.raises(ValueError, match="Only the trained layer has layers/0/embedding"):
        trainer.update([other[1], *other[1:]])
    with pytest.raises(ValueError, match="layers/1 is the class Block"):
        trainer.update([other[0], Block, *other[2:]])
    with pytest.raises(ValueError, match=r"a list of the 4 layers of the trainer. Got 1\."):
        trainer.update(other[:1])
    assert meshpipe.Trainer is Trainer
