"""Counts the floating-point operations of a traced program, and the bytes that it moves."""

import math
from collections.abc import Iterable
from typing import Any, cast

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params

from meshpipe.stage.jaxpr import LAYOUT_PRIMITIVES

MOVES = LAYOUT_PRIMITIVES | {
    "concatenate",
    "convert_element_type",
    "dynamic_slice",
    "dynamic_update_slice",
    "gather",
    "iota",
    "pad",
    "rev",
    "select_n",
    "slice",
    "split",
    "stop_gradient",
}
"""Operations that move data and compute nothing."""
CUDNN_ATTENTION = "dot_product_attention_fwd_wrapper"
"""The primitive of `jax.nn.dot_product_attention` with `implementation="cudnn"`."""


def count_operations(program: ClosedJaxpr | Jaxpr) -> float:
    """An estimate: matrix products and convolutions by their sizes, other work as one operation per element.

    A `scan` counts its body for every iteration, and a Pallas kernel for every step of its grid; a `while` counts once,
    since its length is unknown, and a `cond` its most expensive branch. Moving data counts nothing.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def count_bytes(program: ClosedJaxpr | Jaxpr) -> float:
    """An estimate of the bytes read from and written to memory: by the program's own inputs and outputs, and by its
    matrix products and convolutions. All other work counts as fused with these.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return float(_bytes_of((*jaxpr.invars, *jaxpr.outvars))) + _bytes_of_products(jaxpr)


def repeats(equation: JaxprEqn) -> int:
    """How often the program inside an equation runs: for every iteration of a scan, on every device of a `shard_map`,
    and for every step of the grid of a Pallas kernel.
    """
    params = equation.params
    match equation.primitive.name:
        case "shard_map":
            return params["mesh"].size
        case "pallas_call":
            return math.prod(params["grid_mapping"].grid)
    return params.get("length", 1)


def _bytes_of_products(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            total += _bytes_of((*equation.invars, *equation.outvars))
        inner = [_bytes_of_products(part) for part in jaxprs_in_params(equation.params)]
        if inner:
            most = max(inner) if equation.primitive.name == "cond" else sum(inner)
            total += repeats(equation) * most
    return total


def _bytes_of(values: Iterable[Any]) -> int:
    sized = [value.aval for value in values if hasattr(value.aval, "dtype")]
    return sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in sized)


def _of_equation(equation: JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    inner = [count_operations(part) for part in jaxprs_in_params(params)]
    # Reductions such as `reduce` hold a program too, for two elements; they are counted by the size of what they
    # reduce.
    if name == "cond":
        return max(inner)
    if inner and not name.startswith("reduce"):
        return repeats(equation) * sum(inner)
    product = of_product(equation)
    if product:
        return product
    output: Any = equation.outvars[0].aval if equation.outvars else None
    if not hasattr(output, "dtype") or not jnp.issubdtype(output.dtype, jnp.inexact) or name in MOVES:
        return 0.0
    size = float(math.prod(output.shape))
    if name.startswith("reduce"):
        return float(math.prod(equation.invars[0].aval.shape))  # type: ignore[attr-defined]
    return size


def of_product(equation: JaxprEqn) -> float:
    """The operations of a matrix product, a convolution or cuDNN's attention; 0 for any other equation."""
    name, params = equation.primitive.name, equation.params
    if name == CUDNN_ATTENTION:
        # Two products over all pairs of positions: queries with keys, and scores with values. [batch seq head dim], or
        # in another layout [batch head seq dim].
        query, key = (cast(Any, operand.aval).shape for operand in equation.invars[:2])
        return 4.0 * math.prod(query) * key[2 if params.get("layout") else 1]
    if name not in ("dot_general", "conv_general_dilated"):
        return 0.0
    output: Any = equation.outvars[0].aval
    if not jnp.issubdtype(output.dtype, jnp.inexact):
        return 0.0
    size = float(math.prod(output.shape))
    shapes = [operand.aval.shape for operand in equation.invars]  # type: ignore[attr-defined]
    if name == "dot_general":
        # A multiplication and an addition for every element of the output and of the contracted dims.
        (contracted, _), _ = params["dimension_numbers"]
        return 2 * size * math.prod(shapes[0][axis] for axis in contracted)
    # Every output element reads the whole kernel, except for its dim of output features.
    features = params["dimension_numbers"].rhs_spec[0]
    return 2 * size * math.prod(shapes[1]) / shapes[1][features]
