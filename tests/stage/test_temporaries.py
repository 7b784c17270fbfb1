"""Temporary memory estimated from traced programs: sizes by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from meshpipe.stage.temporaries import temporary_bytes

X = jnp.ones((8, 4))
W, V = jnp.ones((4, 4)), jnp.ones((8, 8))
ARRAY = 8 * 4 * 4
"""Bytes of X."""


def chain(x: jax.Array, count: int) -> jax.Array:
    for _ in range(count):
        x = jnp.tanh(x @ W)
    return x


def scanned(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, _: (chain(x, 2) @ W, None), x, length=3)[0].sum()


@pytest.mark.parametrize(
    ("function", "bytes_"),
    [
        (lambda x: x * 2 + 1, 0),  # fused into one loop
        (lambda x: x @ W, 0),  # only what it returns
        (lambda x: jnp.tanh(x @ W), ARRAY),
        (lambda x: jnp.tanh(x @ W) @ W, 2 * ARRAY),  # both sides of the tanh
        (lambda x: chain(x, 5) @ W, 2 * ARRAY),  # and no more, however long the chain
        (lambda x: (x @ W).reshape(4, 8) @ V, ARRAY),  # another shape for the same bytes
        (lambda x: (lambda a, b: (chain(b, 1) + a) @ W)(x @ W, x @ W), 3 * ARRAY),  # a lives until the sum
        (scanned, 3 * ARRAY),  # the carry, and what a turn needs
    ],
)
def test_what_products_read_and_write_counts_while_it_lives(function: Callable[..., Any], bytes_: int) -> None:
    assert temporary_bytes(jax.make_jaxpr(function)(X)) == bytes_
