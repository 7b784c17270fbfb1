"""Rewrites matrix products into the form that XLA's CPU backend multiplies fastest."""

import operator
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from meshpipe.stage.jaxpr import CALL_PRIMITIVES, variables

Atom = Var | Literal

KEEP_BARRIERS: Mapping[str, Any] = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""Compiler options that make `optimization_barrier` hold until the end. By default XLA's CPU backend drops the barriers
before it fuses, and fuses across them."""


def multiply_in_rows(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program with every `(A B)^T` as `B^T A^T`, and the factor `B^T` laid out row by row before it.

    JAX's derivative writes the gradient of a weight as `(A B)^T`, where A is the gradient of an output and B an input.
    XLA's CPU backend takes up to twice as long for that form: its fast kernel wants the summed dim last on the left and
    first on the right. One loop that computes B and transposes it takes up to six times as long as two loops, so
    barriers keep them apart, and the result must be compiled with `KEEP_BARRIERS`. The bodies of scans and calls are
    rewritten too. Those of `jax.shard_map` and of kernels have rules of their own and are left alone.
    """
    return _in(closed, {})


def _in(closed: ClosedJaxpr, forms: dict[Hashable, Jaxpr]) -> ClosedJaxpr:
    jaxpr = _rewrite(closed.jaxpr, forms)
    return closed if jaxpr is closed.jaxpr else ClosedJaxpr(jaxpr, closed.consts)


def _rewrite(jaxpr: Jaxpr, forms: dict[Hashable, Jaxpr]) -> Jaxpr:
    """The rewritten program; the same object where nothing changes, since JAX lowers a shared program only once."""
    uses = Counter(variables([*(v for e in jaxpr.eqns for v in e.invars), *jaxpr.outvars]))
    # A product that is also used untransposed would have to be computed twice.
    products = {e.outvars[0]: e for e in jaxpr.eqns if e.primitive.name == "dot_general" and uses[e.outvars[0]] == 1}
    turned = {
        e.outvars[0]: product
        for e in jaxpr.eqns
        if e.primitive.name == "transpose"
        and (product := products.get(e.invars[0])) is not None  # type: ignore[arg-type]
        and _is_turned(product, e.params["permutation"])
    }
    replaced = {product.outvars[0] for product in turned.values()}
    equations: list[JaxprEqn] = []
    for equation in jaxpr.eqns:
        result = equation.outvars[0] if equation.outvars else None
        if result in turned:
            equations += _turned(turned[result], result, forms)
        elif result not in replaced:
            equations.append(_with_inner(equation, forms))
    is_same = len(equations) == len(jaxpr.eqns) and all(map(operator.is_, equations, jaxpr.eqns))
    return jaxpr if is_same else jaxpr.replace(eqns=equations)


def _with_inner(equation: JaxprEqn, forms: dict[Hashable, Jaxpr]) -> JaxprEqn:
    """The equation; if it is a scan or a call, with its program rewritten."""
    if equation.primitive.name not in CALL_PRIMITIVES | {"scan"}:
        return equation
    inner = equation.params["jaxpr"]
    rewritten = _in(inner, forms) if isinstance(inner, ClosedJaxpr) else _rewrite(inner, forms)
    return equation if rewritten is inner else equation.replace(params=equation.params | {"jaxpr": rewritten})


def _is_turned(product: JaxprEqn, permutation: tuple[int, ...]) -> bool:
    """Whether the permutation swaps the dims of the two factors, so that the transposed product is a product too."""
    (left_summed, _), (batch, _) = product.params["dimension_numbers"]
    ndim = len(permutation)
    num_left = len(product.invars[0].aval.shape) - len(left_summed)  # type: ignore[attr-defined]
    sharding = product.params["out_sharding"]
    # Batch dims come first in any order of factors, and a given sharding names dims in the order of the product.
    is_free = not batch and (sharding is None or not any(sharding.spec))
    return is_free and tuple(permutation) == (*range(num_left, ndim), *range(num_left))


def _turned(product: JaxprEqn, result: Atom, forms: dict[Hashable, Jaxpr]) -> list[JaxprEqn]:
    """Equations for the transposed product."""
    left, right = product.invars
    params = {name: value for name, value in product.params.items() if name not in ("dimension_numbers", "precision")}
    precision = product.params["precision"]
    (left_summed, right_summed), _ = product.params["dimension_numbers"]

    def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
        kept = [dim for dim in range(right.ndim) if dim not in right_summed]
        # The first barrier separates the transposition from what computes the factor, the second from the product, into
        # which XLA would fold it back.
        right = jax.lax.optimization_barrier(right)
        rows = jax.lax.optimization_barrier(jax.lax.transpose(right, (*kept, *right_summed)))
        last = tuple(range(len(kept), right.ndim))
        return jax.lax.dot_general_p.bind(
            rows,
            left,
            dimension_numbers=((last, left_summed), ((), ())),
            # A pair of precisions is for the left and the right factor, which have changed places.
            precision=precision[::-1] if isinstance(precision, tuple) else precision,
            **params,
        )

    # Equal layers have equal products: each form is traced once.
    key = str(left.aval), str(right.aval), str(product.params)
    if key not in forms:
        forms[key] = jax.make_jaxpr(multiply)(left.aval, right.aval).jaxpr
    form = forms[key]
    names: dict[Any, Atom] = dict(zip(form.invars, (left, right), strict=True)) | {form.outvars[0]: result}
    names |= {v: Var(v.aval) for e in form.eqns for v in e.outvars if v not in names}
    equations = []
    for e in form.eqns:
        operands, results = [names[v] for v in e.invars], [names[v] for v in e.outvars]
        made = e.replace(invars=operands, outvars=results)  # type: ignore[arg-type]
        # Errors and profiles then name the line of the user's layer.
        equations.append(made.replace(source_info=product.source_info, ctx=product.ctx))
    return equations
