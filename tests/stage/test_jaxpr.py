"""Cutting traced programs: what is kept, computed once, and left out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Var
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe.mesh import make_mesh
from meshpipe.stage.jaxpr import (
    MissingInputError,
    extract,
    function_of,
    hoistable_values,
    inline,
    invariant_values,
    nbytes,
    variables,
)

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)
W = jax.ShapeDtypeStruct((3, 4), jnp.float32)


def trace(function: Any, *shapes: jax.ShapeDtypeStruct) -> ClosedJaxpr:
    return jax.make_jaxpr(function)(*shapes)


def names(closed: ClosedJaxpr) -> list[str]:
    return [equation.primitive.name for equation in closed.jaxpr.eqns]


def output_of(closed: ClosedJaxpr, primitive: str, index: int = 0) -> Var:
    """The result of the given equation among those with this primitive."""
    return [e.outvars[0] for e in closed.jaxpr.eqns if e.primitive.name == primitive][index]


def described(values: list[Var]) -> list[str]:
    return [v.aval.str_short(short_dtypes=True) for v in values]  # type: ignore[attr-defined]


def test_extract_keeps_what_the_outputs_need() -> None:
    closed = trace(lambda x: (jnp.sin(x), jnp.exp(jnp.cos(x))), X)
    part = extract(closed, closed.jaxpr.invars, closed.jaxpr.outvars[1:])
    assert names(part) == ["cos", "exp"]
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(function_of(part)(x)[0], jnp.exp(jnp.cos(x)))


def test_extract_starts_from_values_in_the_middle() -> None:
    closed = trace(lambda x: jnp.exp(jnp.cos(jnp.sin(x))), X)
    middle = output_of(closed, "cos")
    part = extract(closed, [middle], closed.jaxpr.outvars)
    assert names(part) == ["exp"]
    np.testing.assert_array_equal(function_of(part)(np.zeros((2, 3), np.float32))[0], np.ones((2, 3)))


def test_extract_takes_only_the_constants_it_needs() -> None:
    small, large = np.arange(3.0, dtype=np.float32), np.arange(6.0, dtype=np.float32).reshape(2, 3)
    closed = trace(lambda x: (x + jnp.asarray(small), x * jnp.asarray(large)), X)
    part = extract(closed, closed.jaxpr.invars, closed.jaxpr.outvars[:1])
    assert [np.shape(c) for c in part.consts] in ([(3,)], [])
    np.testing.assert_array_equal(function_of(part)(large)[0], large + small)


def test_extract_passes_inputs_and_literals_through() -> None:
    closed = trace(lambda x: (x, 2.0, jnp.sin(x)), X)
    part = extract(closed, closed.jaxpr.invars, closed.jaxpr.outvars[:2])
    assert names(part) == []
    x = np.ones((2, 3), np.float32)
    passed, literal = function_of(part)(x)
    np.testing.assert_array_equal(passed, x)
    assert literal == 2.0


def test_extract_refuses_what_it_cannot_compute() -> None:
    closed = trace(lambda x, w: x @ w, X, W)
    with pytest.raises(MissingInputError, match="1 are not"):
        extract(closed, closed.jaxpr.invars[:1], closed.jaxpr.outvars)


def test_effects_are_kept_when_asked_for_and_come_out_once(capfd: pytest.CaptureFixture[str]) -> None:
    def printing(x: jax.Array) -> jax.Array:
        jax.debug.print("sum is {}", jnp.sin(x).sum())
        return x + 1

    closed = trace(printing, X)
    x = np.zeros((2, 3), np.float32)
    for effects, times in ((True, 1), (False, 0)):
        part = extract(closed, closed.jaxpr.invars, closed.jaxpr.outvars, effects=effects)
        jax.block_until_ready(jax.jit(lambda *a, part=part: function_of(part)(*a))(x))
        jax.effects_barrier()
        assert capfd.readouterr().out.count("sum is 0.0") == times


def test_invariant_values_depend_on_nothing_but_their_sources() -> None:
    closed = trace(lambda x, w: (jnp.sin(w) + x, jnp.arange(4) * 2), X, jax.ShapeDtypeStruct((3,), jnp.float32))
    invariant = invariant_values(closed.jaxpr, closed.jaxpr.invars[1:])
    assert output_of(closed, "sin") in invariant
    assert output_of(closed, "iota") in invariant
    assert output_of(closed, "add") not in invariant


def test_a_cast_of_a_parameter_is_computed_once_and_its_transpose_in_place() -> None:
    def forward(w: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        half = w.astype(jnp.bfloat16)
        y = x.astype(jnp.bfloat16) @ half
        return y, y @ half.T

    closed = trace(forward, W, X)
    assert described(hoistable_values(closed.jaxpr, closed.jaxpr.invars[:1])) == ["bf16[3,4]"]


def test_a_fused_weight_is_computed_once_and_not_what_it_is_made_of() -> None:
    closed = trace(lambda w, v, x: x @ jnp.tanh(w * v), W, W, X)
    hoisted = hoistable_values(closed.jaxpr, closed.jaxpr.invars[:2])
    assert hoisted == [output_of(closed, "tanh")]


def test_broadcasts_and_growth_of_parameters_stay_in_place() -> None:
    bias = jax.ShapeDtypeStruct((3,), jnp.float32)
    closed = trace(lambda b, x: x + jnp.broadcast_to(b, x.shape) * jnp.ones((2, 3)), bias, X)
    assert hoistable_values(closed.jaxpr, closed.jaxpr.invars[:1]) == []
    grown = trace(lambda b, x: x + jnp.outer(b[:2], b), bias, X)
    assert all(nbytes([v]) <= 12 for v in hoistable_values(grown.jaxpr, grown.jaxpr.invars[:1]))


def test_what_depends_on_no_parameter_is_not_hoisted() -> None:
    closed = trace(lambda w, x: (x @ w) * jnp.cos(jnp.arange(4.0)), W, X)
    assert hoistable_values(closed.jaxpr, closed.jaxpr.invars[:1]) == []


def test_a_print_stays_and_what_it_shows_is_computed_once() -> None:
    def printing(w: jax.Array, x: jax.Array) -> jax.Array:
        jax.debug.print("{}", w.sum())
        return x @ jnp.sin(w)

    closed = trace(printing, W, X)
    assert described(hoistable_values(closed.jaxpr, closed.jaxpr.invars[:1])) == ["f32[]", "f32[3,4]"]
    assert any(e.effects for e in extract(closed, closed.jaxpr.invars, [], effects=True).jaxpr.eqns)


def test_bytes_count_every_value() -> None:
    closed = trace(lambda x, w: x, X, jax.ShapeDtypeStruct((3, 4), jnp.bfloat16))
    assert nbytes(closed.jaxpr.invars) == 2 * 3 * 4 + 3 * 4 * 2


def test_calls_are_replaced_by_what_they_hold() -> None:
    table = np.arange(3, dtype=np.float32)

    @jax.jit
    def twice(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return jnp.sin(x) + jnp.asarray(table), y, jnp.float32(3)

    def function(x: jax.Array) -> Any:
        first, same, three = twice(x, x)
        return jax.checkpoint(jnp.exp)(twice(first, same)[0]), same, three

    closed = trace(function, X)
    flat = inline(closed)
    assert sorted({*names(flat)} - {"add", "broadcast_in_dim"}) == ["exp", "sin"]
    assert names(flat).count("sin") == 2
    x = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    for found, expected in zip(function_of(flat)(x), function(x), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert inline(flat) is flat


def test_calls_that_place_their_values_and_prints_stay() -> None:
    mesh = make_mesh(1)
    placed = jax.jit(jnp.sin, out_shardings=NamedSharding(mesh, PartitionSpec()))

    @jax.jit
    def printing(x: jax.Array) -> jax.Array:
        jax.debug.print("{}", x)
        return jnp.cos(x)

    flat = inline(trace(lambda x: printing(placed(x)), X))
    assert "sin" not in names(flat)
    assert "cos" in names(flat)
    assert flat.jaxpr.effects


@pytest.mark.parametrize("prevent_cse", [True, False])
def test_a_checkpoint_of_a_derivative_waits_for_the_gradient_and_not_for_parameters(prevent_cse: bool) -> None:
    layer = jax.checkpoint(lambda w, x: jnp.sin(jnp.tanh(x @ w)), prevent_cse=prevent_cse)

    def backward(w: jax.Array, x: jax.Array, gradient: jax.Array) -> Any:
        return jax.vjp(layer, w, x)[1](gradient)

    values = [jnp.linspace(0.1, 1, 9).reshape(3, 3) * factor for factor in (1, 2, 3)]
    closed = jax.make_jaxpr(backward)(*values)
    w, x, gradient = closed.jaxpr.invars
    flat = inline(closed, [x, gradient])
    barriers = [e for e in flat.jaxpr.eqns if e.primitive.name == "optimization_barrier"]
    assert [set(e.invars) for e in barriers] == ([{x, gradient}] if prevent_cse else [])
    # Nothing after the barrier reads what it holds back.
    after = flat.jaxpr.eqns[flat.jaxpr.eqns.index(barriers[0]) + 1 :] if barriers else []
    assert not any(v in {x, gradient} for e in after for v in variables(e.invars))
    assert any(w in variables(e.invars) for e in flat.jaxpr.eqns)
    for found, expected in zip(function_of(flat)(*values), backward(*values), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
