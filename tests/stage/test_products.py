"""Products of matrices rewritten for XLA's CPU backend: the same values, found where they are, and nowhere else."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params
from jax.sharding import PartitionSpec as P

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.stage.jaxpr import function_of
from meshpipe.stage.products import KEEP_BARRIERS, multiply_in_rows


def array(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


def names(program: ClosedJaxpr | Jaxpr) -> list[str]:
    """The operations of a program and of those inside of it, in their order."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    found: list[str] = []
    for equation in jaxpr.eqns:
        found += [
            equation.primitive.name,
            *(name for part in jaxprs_in_params(equation.params) for name in names(part)),
        ]
    return found


def weight_gradient(layer: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return jax.grad(lambda w, x: jnp.sin(layer(w, x)).sum())


def layers(w: jax.Array, x: jax.Array) -> jax.Array:
    for _ in range(2):
        x = jnp.tanh(x @ w)
    return x


def scanned(w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0]


@pytest.mark.parametrize(
    ("layer", "w", "x", "count"),
    [
        (lambda w, x: x @ w, (4, 6), (8, 4), 1),
        (lambda w, x: x @ w, (4, 6), (2, 8, 4), 1),
        (lambda w, x: jnp.einsum("btd,dhk->bthk", x, w), (4, 2, 3), (2, 8, 4), 1),
        (lambda w, x: jnp.einsum("bthk,hkd->btd", x, w), (2, 3, 4), (2, 8, 2, 3), 1),
        (layers, (4, 4), (2, 8, 4), 2),
        (scanned, (4, 4), (2, 8, 4), 1),
        (jax.checkpoint(layers), (4, 4), (2, 8, 4), 2),
        (jax.jit(layers), (4, 4), (2, 8, 4), 2),
    ],
    ids=["rows", "batches", "several columns", "several rows", "layers", "scan", "checkpoint", "jit"],
)
def test_the_gradient_of_a_weight_is_the_same(
    layer: Callable[..., Any], w: tuple[int, ...], x: tuple[int, ...], count: int
) -> None:
    traced = jax.make_jaxpr(weight_gradient(layer))(array(*w), array(*x))
    rewritten = multiply_in_rows(traced)
    assert names(rewritten).count("optimization_barrier") == names(traced).count("optimization_barrier") + 2 * count
    assert names(rewritten).count("dot_general") == names(traced).count("dot_general")
    (found,), (expected,) = (function_of(program)(array(*w), array(*x)) for program in (rewritten, traced))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: (product := a @ b, product.T),
        lambda a, b: jnp.einsum("ij,jk->ik", a, b),
        lambda a, b: jnp.einsum("bij,bjk->kbi", a[None], b[None]),
        lambda a, b: jnp.einsum("ijl,jk->ilk", a[..., None], b).transpose(1, 2, 0),
        lambda a, b: (a + 1).T @ b.T[:4],
    ],
    ids=["needed itself", "not transposed", "with a batch", "another order", "a factor transposed"],
)
def test_what_is_no_transposed_product_stays(function: Callable[..., Any]) -> None:
    a, b = array(4, 4), array(4, 4)
    traced = jax.make_jaxpr(function)(a, b)
    assert str(multiply_in_rows(traced)) == str(traced)


def test_what_holds_no_such_product_is_the_same_object() -> None:
    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(x), None

    traced = jax.make_jaxpr(lambda x: jax.lax.scan(body, x, length=3)[0])(array(4))
    assert multiply_in_rows(traced) is traced


def test_the_bodies_of_shard_map_stay() -> None:
    mesh = make_mesh(1, 2)

    def layer(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.shard_map(lambda w, x: x @ w, in_specs=(P(), P("data")), out_specs=P("data"), mesh=mesh)(w, x)

    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(weight_gradient(layer))(array(4, 6), array(8, 4))
        assert str(multiply_in_rows(traced)) == str(traced)


def test_a_sharding_that_the_user_gave_stays() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, w = jax.device_put(array(8, 4), P("data")), jax.device_put(array(6, 4), P())
        traced = jax.make_jaxpr(lambda x, w: jnp.einsum("td,kd->tk", x, w, out_sharding=P("data", None)).T)(x, w)
    assert "dot_general" in names(traced)
    assert str(multiply_in_rows(traced)) == str(traced)


def test_factors_keep_their_precision() -> None:
    precision = (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT)
    traced = jax.make_jaxpr(lambda a, b: jax.lax.dot(a, b, precision=precision).T)(array(4, 4), array(4, 4))
    product = next(e for e in multiply_in_rows(traced).jaxpr.eqns if e.primitive.name == "dot_general")
    assert product.params["precision"] == precision[::-1]
    assert product.source_info is traced.jaxpr.eqns[0].source_info


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_backward_programs_have_them(schedule: str) -> None:
    trainer = Trainer(
        [functools.partial(nnx.Linear, 4, 4)] * 2,
        lambda output, batch: ((output**2).sum(), output.size),
        optax.sgd(0.1),
        batch={"inputs": np.ones((8, 4), np.float32)},
        mesh=make_mesh(2),
        pipeline=PipelineConfig(schedule=schedule, num_microbatches=2),
    )
    for programs in trainer.model.programs.values():
        weights = programs.split.weight if programs.split is not None else programs.backward
        assert isinstance(weights, jax.stages.Compiled)
        assert "opt-barrier" in weights.as_text()


def test_barriers_hold_until_the_end() -> None:
    def transposed(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.optimization_barrier(x + y).T

    lowered = jax.jit(transposed).lower(array(8, 4), array(8, 4))
    assert "opt-barrier" in lowered.compile(compiler_options=dict(KEEP_BARRIERS)).as_text()
    assert "opt-barrier" not in lowered.compile().as_text()
