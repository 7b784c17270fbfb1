"""Inputs that a traced program hands on, through whatever it calls, and those that it changes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from meshpipe.stage.passthrough import forwarded

A, B = jnp.ones((3, 2)), jnp.ones((3, 2))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b: (b, a, a), [1, 0, 0]),
        (lambda a, b: (a * 1, jnp.copy(b)), [None, 1]),
        (lambda a, b: (a.T.T, b.T), [0, None]),
        (lambda a, b: jax.jit(lambda a, b: (b, a + b))(a, b), [1, None]),
        (lambda a, b: jax.checkpoint(lambda a, b: (jax.jit(lambda b: b)(b), jnp.sin(a)))(a, b), [1, None]),
        (lambda a, b: jax.lax.cond(a.sum() > 0, lambda a, b: (a, b), lambda a, b: (a, a), a, b), [0, None]),
        (lambda a, b: jax.lax.while_loop(lambda c: c[0].sum() < 9, lambda c: (c[0] + 1, c[1]), (a, b)), [None, 1]),
        (lambda a, b: jax.lax.while_loop(lambda c: c[0].sum() < 9, lambda c: (c[1], c[0]), (a, b)), [None, None]),
        (lambda a, b: jax.lax.scan(lambda c, x: (c, (x, x + 1)), a, b), [0, 1, None]),
        (lambda a, b: jax.lax.scan(lambda c, x: (c + 1, a), 0.0, b), [None, None]),
        (lambda a, b: jax.lax.scan(lambda c, x: ((c[1], c[0]), x), (a, a), b), [None, None, 1]),
        (lambda a, b: jax.vmap(lambda a, b: (a, a + b))(a, b), [0, None]),
        (lambda a, b: (jnp.zeros(()), jnp.where(a > b, a, b)), [None, None]),
    ],
)
def test_each_output_is_known_by_the_input_that_it_is(function: Callable[..., Any], expected: list[int | None]) -> None:
    jaxpr = jax.make_jaxpr(lambda *given: jax.tree.leaves(function(*given)))(A, B).jaxpr
    assert forwarded(jaxpr) == expected
