"""Values that a pure function could distinguish never have the same fingerprint."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshpipe.compiler.fingerprint import fingerprint


def times(factor):
    return lambda x: x * factor


def default(factor):
    def scale(x, factor=factor):
        return x * factor

    return scale


def recursive(factor):
    def power(x, n):
        return power(x, n - 1) * factor if n else x

    return power


@dataclasses.dataclass
class Sizes:
    width: int


class Number(int):
    pass


class Opaque:
    pass


class Method:
    def scale(self, x):
        return x


@pytest.mark.parametrize(
    "make",
    [
        lambda: (1, [2.0, "three"], {"four": None}),
        lambda: times(2.0),
        lambda: default(2.0),
        lambda: times(times(2.0)),
        lambda: functools.partial(times, 2.0),
        lambda: functools.partial(times(2.0), n=1),
        lambda: Sizes(3),
        lambda: np.arange(3),
        lambda: np.float32(2),
        lambda: jnp.float32,
        lambda: nnx.with_partitioning(nnx.initializers.normal(0.1), ("embed", None)),
        lambda: nnx.split(nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0)))[0],
    ],
)
def test_equal(make):
    one, two = make(), make()
    assert fingerprint(one) == fingerprint(two)
    assert hash(fingerprint(one)) == hash(fingerprint(two))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        ((1,), [1]),
        ((1, 2), (1, 2.0)),
        (1, Number(1)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (times(1), times(1.0)),
        (times(2), lambda x: x * 2),
        (default(1), default(2)),
        (functools.partial(times, 1), functools.partial(times, 2)),
        (Sizes(1), Sizes(2)),
        (Opaque(), Opaque()),
        (times(Opaque()), times(Opaque())),
        (Method().scale, Method().scale),
        (np.zeros(2), np.zeros(2, np.float32)),
        (np.zeros(2), -np.zeros(2)),
        (np.float32(2), np.float32(3)),
        (np.float32(2), np.float16(2)),
        (jnp.float32, jnp.float16),
    ],
)
def test_different(one: Any, two: Any):
    assert fingerprint(one) != fingerprint(two)


def test_a_function_that_refers_to_itself():
    one = recursive(2)
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(recursive(3))
