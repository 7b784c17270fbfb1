"""Layers as users write them: how they are made, what they own, what their call is given, and what they draw."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from one_layer import FIELDS, X, call, draws, layer_of, values

from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.layer import Layer


class Frozen(nnx.Variable[jax.Array]):
    pass


class Everything(nnx.Module):
    """A leaf of every kind."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(
            4, 6, kernel_init=nnx.with_partitioning(nnx.initializers.ones, ("embed", "hidden")), rngs=rngs
        )
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.frozen = Frozen(jnp.ones(6))
        self.order = nnx.Param(jnp.arange(6))
        self.table = nnx.data(jnp.ones(6))
        self.numbers = np.ones(6, np.float32)
        self.blocks = nnx.List([nnx.Linear(6, 6, rngs=rngs), nnx.Linear(6, 6, use_bias=False, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(self.linear(x)) * self.frozen[...] * self.table * self.numbers
        for block in self.blocks:
            x = block(x)
        return self.drop(x)[:, self.order[...]]


def test_leaves_have_stable_paths_and_only_floating_params_are_trained() -> None:
    layers = abstract_layers([Everything, Everything], FIELDS)
    assert set(layers[1].params) == {
        "layers/1/linear/kernel",
        "layers/1/linear/bias",
        "layers/1/norm/scale",
        "layers/1/norm/bias",
        "layers/1/blocks/0/kernel",
        "layers/1/blocks/0/bias",
        "layers/1/blocks/1/kernel",
    }
    assert set(layers[1].state) == {
        f"layers/1/{name}" for name in ("norm/mean", "norm/var", "frozen", "order", "table", "numbers")
    }
    assert layers[1].axes == {"layers/1/linear/kernel": ("embed", "hidden")}
    assert layers[1].has_randomness
    assert layers[0].params["layers/0/linear/kernel"] == jax.ShapeDtypeStruct((4, 6), jnp.float32)


def test_all_leaves_take_part_in_the_call() -> None:
    output, after = call(layer_of(Everything), train=True)
    assert output.shape == (2, 6)
    assert after.keys() == layer_of(Everything).state.keys()
    assert float(after["layers/0/norm/mean"][0]) != 1  # the running mean has moved


def test_a_module_in_two_places_has_one_set_of_leaves() -> None:
    class Twice(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(4, 4, rngs=rngs)
            self.again = nnx.Dict({"and": self.first})
            self.last = self.first

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.last(self.first(x))

    layer = layer_of(Twice)
    assert len(layer.params) == 2
    assert call(layer)[0].shape == X.shape


def test_nothing_is_allocated_for_a_constructor() -> None:
    before = len(jax.live_arrays())
    layer = layer_of(lambda rngs: nnx.Linear(1000, 1000, rngs=rngs))
    assert layer.values is None
    assert len(jax.live_arrays()) <= before


class Plain(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Sized(nnx.Module):
    def __init__(self, size: int, *, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (size,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def by_position(streams: nnx.Rngs, /) -> nnx.Module:
    return nnx.Linear(4, 4, rngs=streams)


def without_arguments() -> nnx.Module:
    return Plain()


@pytest.mark.parametrize(
    ("constructor", "leaves"),
    [
        (Everything, 7),
        (Plain, 0),
        (functools.partial(nnx.Linear, 4, 4), 2),
        (functools.partial(nnx.Linear, in_features=4, out_features=4, use_bias=False), 1),
        (functools.partial(Sized, 3), 1),
        (lambda rngs: nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), jnp.tanh), 2),
        (by_position, 2),
        (without_arguments, 0),
        (functools.partial(nnx.Embed, num_embeddings=3, features=4), 1),
    ],
)
def test_constructors_of_every_form(constructor: Callable[..., nnx.Module], leaves: int) -> None:
    layer = layer_of(constructor)
    assert len(layer.params) == leaves
    made, _ = layer.initialise(jax.random.key(0), jnp.uint32(0))
    assert {path: leaf.shape for path, leaf in made.items()} == {p: s.shape for p, s in layer.params.items()}


def test_a_ready_made_module_brings_its_values() -> None:
    module = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    module.mean[...] = jnp.arange(4.0)
    layer = layer_of(module)
    assert layer.values is not None
    np.testing.assert_array_equal(layer.values["layers/0/mean"], np.arange(4.0))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(layer.structure))


class Fields(nnx.Module):
    def __call__(self, x: Any, targets: Any, *, mask: Any, train: bool, scale: float = 2.0, **more: Any) -> Any:
        return x * scale, targets, mask, train, more


class Inputs(nnx.Module):
    """Its first parameter is the activation, although a batch field is called the same."""

    def __call__(self, inputs: jax.Array, train: bool = False) -> Any:
        return inputs, train


@pytest.mark.parametrize("train", [True, False])
def test_a_call_gets_the_batch_fields_and_train_that_it_names(train: bool) -> None:
    layer = layer_of(Fields)
    assert (set(layer.fields), layer.modes) == ({"targets", "mask"}, ("train",))
    batch = {"mask": "a mask", "targets": "targets"}
    (x, *others), _ = call(layer, 3.0, train=train, batch=batch)
    assert (x, *others) == (6.0, "targets", "a mask", train, {})
    assert call(layer_of(Inputs), 5.0, train=train)[0] == (5.0, train)


def test_a_batch_field_called_train_is_that_field() -> None:
    layer = layer_of(Inputs, ("inputs", "train"))
    assert call(layer, 5.0, train=True, batch={"train": "from the batch"})[0] == (5.0, "from the batch")


def test_evaluation_switches_dropout_off_and_uses_batch_statistics() -> None:
    dropout = layer_of(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
    np.testing.assert_array_equal(call(dropout, train=False)[0], X)
    assert not np.array_equal(call(dropout, np.ones((8, 8), np.float32))[0], np.ones((8, 8)))
    norm = layer_of(lambda rngs: nnx.BatchNorm(4, rngs=rngs), ("inputs",))
    _, after = call(norm, train=False)
    for path, leaf in values(norm.state).items():
        np.testing.assert_array_equal(after[path], leaf)


def test_draws_depend_on_seed_step_microbatch_and_path_and_on_nothing_else() -> None:
    first, second = abstract_layers([lambda rngs: nnx.Dropout(0.5, rngs=rngs)] * 2, FIELDS)
    x = np.ones((8, 8), np.float32)

    def mask(layer: Layer, **numbers: int) -> bytes:
        return np.asarray(call(layer, x, randomness=draws(**numbers))[0]).tobytes()

    masks = [mask(first), mask(second), mask(first, seed=1), mask(first, step=1), mask(first, microbatch=1)]
    assert len(set(masks)) == 5
    assert mask(first) == masks[0]


def test_a_layer_that_draws_twice_draws_differently() -> None:
    class Twice(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.rngs = rngs.fork()

        def __call__(self, x: jax.Array) -> Any:
            return jax.random.normal(self.rngs.noise(), x.shape), jax.random.normal(self.rngs.noise(), x.shape)

    (a, b), _ = call(layer_of(Twice))
    assert not np.array_equal(a, b)


class RawArray(nnx.Module):
    def __init__(self) -> None:
        self.table = jnp.arange(4.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.table


class Requires(nnx.Module):
    def __call__(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        return x + positions


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([lambda rngs: jnp.tanh], r"That of layers/0 returned an? \w+. For a function of the activation, give"),
        ([Requires], r"layers/0 \(Requires\) requires 'positions'; the batch has inputs, mask, targets. Add the field"),
        ([RawArray], r"layers/0/table is a plain array; write nnx.Variable\(...\) around it"),
    ],
)
def test_what_is_no_layer_is_refused(layers: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        abstract_layers(layers, FIELDS)
