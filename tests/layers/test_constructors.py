"""What stands in the list of layers: modules, constructors of every form, and functions of the activation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from one_layer import X, call, draws, layer_of

from meshpipe.errors import advice_on
from meshpipe.layers.examine import abstract_layers


class Sized(nnx.Module):
    def __init__(self, size: int = 4, **more: Any):
        self.linear = nnx.Linear(size, size, **more)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


class Fixed(nnx.Module):
    """Makes do without random numbers, and has a default that is no stream."""

    def __init__(self, size: int = 4):
        self.scale = nnx.Param(jnp.ones(size))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.scale


def shifted(x: jax.Array, mask: jax.Array, by: float = 1.0) -> jax.Array:
    return x + mask[:, None] * by


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (nnx.relu, X),
        (jnp.tanh, np.tanh(X)),
        (functools.partial(jax.nn.gelu, approximate=False), jax.nn.gelu(X, approximate=False)),
        (lambda x: 2 * x, 2 * X),
        (lambda value: value.reshape(4, 2), X.reshape(4, 2)),
        (functools.partial(shifted, by=2.0), X + 2),
        (lambda x: x, X),
    ],
)
def test_a_function_of_the_activation_is_a_layer(function: Any, expected: Any) -> None:
    layer = layer_of(function)
    assert (layer.params, layer.state, layer.streams) == ({}, {}, ())
    output, _ = call(layer, batch={"mask": jnp.ones(2), "inputs": X})
    np.testing.assert_allclose(output, expected, rtol=1e-6)


def test_a_function_twice_is_one_kind_of_layer() -> None:
    first, _, again = abstract_layers([nnx.relu, nnx.tanh, nnx.relu], ("inputs",))
    assert first.kind == again.kind
    assert first.class_name == "relu"


def test_keywords_of_a_library_s_function_are_no_batch_fields() -> None:
    layer = layer_of(jax.nn.softmax, ("inputs", "axis", "where"))
    np.testing.assert_allclose(call(layer, batch={"axis": 0, "where": 0})[0], jax.nn.softmax(X), rtol=1e-6)


@pytest.mark.parametrize(
    ("constructor", "leaves"),
    [
        (Fixed, 1),
        (functools.partial(nnx.Sequential, jnp.tanh, jnp.tanh), 0),
        (lambda streams: nnx.Linear(4, 4, rngs=streams), 2),
        (Sized, 2),
    ],
)
def test_constructors_are_given_streams_where_they_take_them(constructor: Any, leaves: int) -> None:
    assert len(layer_of(constructor).params) == leaves


class NeedsValues(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.scale = float(jnp.sqrt(4.0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x / self.scale


class NoCall(nnx.Module):
    pass


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nnx.Linear, r"requires in_features, out_features. Write functools.partial\(Linear, in_features=..., out_"),
        (linen.Dense(4), r"layers/0 is a Dense of flax.linen. Wrap it"),
        (NoCall, r"layers/0 is a NoCall, which has none"),
        (NoCall(), r"layers/0 is a NoCall, which has none"),
        (lambda rngs: 3, r"That of layers/0 returned an int. For a function of the activation, give the function"),
    ],
)
def test_what_makes_no_layer_is_refused(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(layer)


def test_errors_of_constructors_say_which() -> None:
    with pytest.raises(jax.errors.ConcretizationTypeError) as error:
        abstract_layers([NeedsValues], ("inputs",))
    (advice,) = advice_on(error.value)
    assert advice.startswith("This comes from the constructor of layers/0 (NeedsValues). Constructors are traced")
    assert "give the module itself, e.g. NeedsValues(rngs=nnx.Rngs(0))" in advice

    def broken(rngs: nnx.Rngs) -> nnx.Module:
        raise KeyError("width")

    with pytest.raises(KeyError) as broke:
        abstract_layers([nnx.relu, broken], ("inputs",))
    assert advice_on(broke.value) == ["This comes from the constructor of layers/1 (broken)."]
    np.testing.assert_allclose(call(layer_of(NeedsValues(nnx.Rngs(0))))[0], X / 2)


class Noisy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        return jax.random.normal(rngs.noise(), x.shape)


def noise(x: jax.Array, rngs: nnx.Rngs) -> jax.Array:
    return jax.random.normal(rngs.noise(), x.shape)


def test_a_call_that_asks_for_rngs_gets_a_stream() -> None:
    first, second = abstract_layers([Noisy, Noisy], ("inputs",))
    assert first.streams == ("layers/0()",)
    assert second.streams == ("layers/1()",)

    def drawn(layer: Any, **numbers: int) -> bytes:
        return np.asarray(call(layer, randomness=draws(**numbers))[0]).tobytes()

    values = [drawn(first), drawn(second), drawn(first, seed=1), drawn(first, step=1), drawn(first, microbatch=1)]
    assert len(set(values)) == 5
    assert drawn(first) == values[0]


def test_optional_rngs_are_for_modules_without_streams() -> None:
    own = layer_of(lambda rngs: nnx.Dropout(0.5, rngs=rngs))
    assert not any(stream.endswith("()") for stream in own.streams)
    lent = layer_of(lambda: nnx.Dropout(0.5))
    assert lent.streams == ("layers/0()",)
    x = np.ones((16, 16), np.float32)
    assert not np.array_equal(call(lent, x)[0], x)
    np.testing.assert_array_equal(call(lent, x, train=False)[0], x)


def test_a_batch_field_called_rngs_is_that_field() -> None:
    layer = layer_of(Noisy, ("inputs", "rngs"))
    assert layer.fields == {"rngs": "rngs"}
    assert not layer.streams
