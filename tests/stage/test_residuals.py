"""What is kept for later: what costs least, checked against every other choice on small programs."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, JaxprEqn, Var

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.stage.jaxpr import LAYOUT_PRIMITIVES, MissingInputError, extract, nbytes, variables
from meshpipe.stage.residuals import (
    ARITHMETIC_PRIMITIVES,
    ELEMENTWISE_PRIMITIVES,
    WRITE,
    least_to_keep,
    values_not_written,
)
from meshpipe.stage.target import ACCELERATOR, CPU, Target

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)
W = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def trace(function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> ClosedJaxpr:
    return jax.make_jaxpr(function)(*shapes)


def output_of(closed: ClosedJaxpr, primitive: str) -> Var:
    return next(e.outvars[0] for e in closed.jaxpr.eqns if e.primitive.name == primitive)


def kept(closed: ClosedJaxpr, primitives: frozenset[str], given: set[Var] = frozenset(), **kwargs: Any) -> list[Var]:  # type: ignore[assignment]
    def repeatable(equation: JaxprEqn) -> bool:
        return equation.primitive.name in primitives

    return least_to_keep(closed.jaxpr, variables(closed.jaxpr.outvars), given, repeatable, **kwargs)


def test_an_array_and_its_rearrangements_are_kept_once() -> None:
    closed = trace(lambda x: (a := jnp.sin(x), a.T, a.reshape(6), jnp.exp(a.T)), X)
    assert kept(closed, LAYOUT_PRIMITIVES) == [output_of(closed, "sin"), output_of(closed, "exp")]
    assert kept(closed, ELEMENTWISE_PRIMITIVES - {"sin"}) == [output_of(closed, "sin")]


def test_a_broadcast_is_kept_as_what_it_came_from() -> None:
    def forward(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(jnp.sum(x, axis=1, keepdims=True), (2, 300)).reshape(300, 2)

    (root,) = kept(trace(forward, X), LAYOUT_PRIMITIVES)
    assert nbytes([root]) == 8


def test_rearrangements_of_given_values_are_not_kept() -> None:
    closed = trace(lambda x, w: (w.T, x @ w), X, W)
    assert kept(closed, LAYOUT_PRIMITIVES, set(closed.jaxpr.invars[1:])) == [output_of(closed, "dot_general")]


def test_of_gelu_one_array_is_kept_where_tanh_is_cheap_and_two_where_it_is_not() -> None:
    def forward(x: jax.Array, w: jax.Array) -> Any:
        _, pull_back = jax.vjp(lambda x, w: jax.nn.gelu(x @ w), x, w)
        return jax.tree.leaves(pull_back)

    closed = trace(forward, X, W)
    product = output_of(closed, "dot_general")
    given = set(closed.jaxpr.invars)
    assert kept(closed, ELEMENTWISE_PRIMITIVES, given) == [product]
    assert kept(closed, ARITHMETIC_PRIMITIVES, given) == [product, output_of(closed, "tanh")]


def test_what_is_there_anyway_is_preferred_to_a_new_array_of_its_size() -> None:
    closed = trace(lambda x: x.T, X)
    assert kept(closed, ARITHMETIC_PRIMITIVES) == closed.jaxpr.invars


def test_an_input_is_preferred_to_a_sum_of_its_size() -> None:
    closed = trace(lambda x, y: x + y, X, X)
    x, y = closed.jaxpr.invars
    assert kept(closed, ARITHMETIC_PRIMITIVES, {y}) == [x]


def test_arrays_without_elements_can_be_kept() -> None:
    empty = jax.ShapeDtypeStruct((4, 0), jnp.float32)
    closed = trace(jnp.sin, empty)
    assert kept(closed, ARITHMETIC_PRIMITIVES) == closed.jaxpr.outvars


def test_of_a_softmax_the_product_is_kept_that_is_written_anyway() -> None:
    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        scores = x @ w
        return jnp.exp(scores - scores.max(axis=1, keepdims=True))

    closed = trace(forward, X, jax.ShapeDtypeStruct((3, 400), jnp.float32))
    assert kept(closed, ELEMENTWISE_PRIMITIVES) == [output_of(closed, name) for name in ("dot_general", "reduce_max")]
    sums = trace(lambda x, w, v: (a := jnp.sin(x @ w) + x @ v, jnp.exp(a)), X, W, W)
    assert kept(sums, ELEMENTWISE_PRIMITIVES) == [output_of(sums, "add")], "which is one array to read, not two"
    # what makes an array smaller is worth its write
    smaller = trace(lambda x, w: (x @ w).astype(jnp.bfloat16), X, W)
    assert kept(smaller, ELEMENTWISE_PRIMITIVES) == smaller.jaxpr.outvars


def test_what_cannot_be_kept_is_had_from_what_it_comes_from() -> None:
    closed = trace(lambda x: jnp.exp(x) * jnp.sin(x), X)
    exp, mul = output_of(closed, "exp"), output_of(closed, "mul")
    assert kept(closed, ARITHMETIC_PRIMITIVES) == [mul]
    # exp is computed by the later part itself
    assert kept(closed, ARITHMETIC_PRIMITIVES, only_later=[exp, mul]) == [output_of(closed, "sin")]


def test_sizes_beyond_32_bits_are_compared() -> None:
    large = jax.ShapeDtypeStruct((2**20, 2**13), jnp.float32)
    closed = trace(lambda x: jnp.sin(x).astype(jnp.bfloat16).astype(jnp.float32) + 1, large)
    (value,) = kept(closed, ARITHMETIC_PRIMITIVES)
    assert value.aval.dtype == jnp.bfloat16


@st.composite
def programs(draw: st.DrawFn) -> tuple[ClosedJaxpr, list[int]]:
    """A program of a few operations, and those of its values that are wanted."""
    steps = draw(
        st.lists(st.tuples(st.sampled_from("+s.e-"), st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=7)
    )

    def run(x: jax.Array) -> list[jax.Array]:
        values = [x]
        for operation, i, j in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            if operation == "+":
                values.append(jnp.resize(a, (6,)) * jnp.ones(6) if a.size < 6 else a + jnp.resize(b, a.shape))
            elif operation == "-":
                values.append(-a)
            elif operation == "e":
                values.append(jnp.exp(a))
            else:
                values.append(jnp.sin(a) if operation == "s" else a.sum(keepdims=True))
        return values[1:]

    closed = jax.make_jaxpr(run)(jax.ShapeDtypeStruct((6,), jnp.float32))
    wanted = draw(st.lists(st.integers(0, len(steps) - 1), min_size=1, max_size=3, unique=True))
    return closed, wanted


@settings(max_examples=60)
@given(programs())
def test_no_other_choice_costs_less(program: tuple[ClosedJaxpr, list[int]]) -> None:
    closed, wanted = program
    jaxpr = closed.jaxpr
    outputs = variables([jaxpr.outvars[i] for i in wanted])

    def repeatable(equation: JaxprEqn) -> bool:
        return equation.primitive.name in ARITHMETIC_PRIMITIVES

    def suffices(values: tuple[Var, ...]) -> bool:
        try:
            part = extract(closed, list(values), outputs)
        except MissingInputError:
            return False
        return all(map(repeatable, part.jaxpr.eqns))

    found = least_to_keep(jaxpr, outputs, (), repeatable)
    assert suffices(tuple(found))
    everything = [*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)]
    unwritten = values_not_written(jaxpr)
    costs = {v: nbytes([v]) * (1 + WRITE * (v in unwritten)) for v in everything}
    choices = (c for n in range(min(4, len(costs) + 1)) for c in itertools.combinations(costs, n))
    assert all(sum(map(costs.get, c)) >= sum(map(costs.get, found)) for c in choices if suffices(c))


@pytest.mark.slow
def test_gradients_are_the_same_from_what_an_accelerator_keeps() -> None:
    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attention(self.norm(x))
            return x + self.down(jax.nn.gelu(self.up(x)))

    inputs = np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)

    def gradients(schedule: str, target: Target) -> tuple[dict[str, jax.Array], int]:
        trainer = Trainer(
            [Block] * 2,
            lambda output, batch: ((output**2).sum(), output.size),
            optax.sgd(0.1),
            batch={"inputs": inputs},
            mesh=make_mesh(2),
            pipeline=PipelineConfig(schedule=schedule, num_microbatches=2),
            target=target,
        )
        residuals = [v for stage in trainer.model.traced.values() for v in stage.residual_vars]
        return trainer.loss_and_gradients({"inputs": inputs})[1], nbytes(residuals)

    expected, many = gradients("1f1b", CPU)
    for schedule in ("1f1b", "zb-h1"):
        found, few = gradients(schedule, ACCELERATOR)
        assert few < 0.8 * many
        for path, gradient in expected.items():
            np.testing.assert_allclose(found[path], gradient, rtol=1e-4, atol=1e-6)
