"""The products that a step must compute: those of forward, and those of the gradients that it makes."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxprs_in_params

from meshpipe.stage.jaxpr import scan_sizes
from meshpipe.stage.operations import CUDNN_ATTENTION, of_product, repeats
from meshpipe.stage.traced import TracedStage

Counts = dict[str, float]
"""Floating-point operations by the dtype of their operands."""


def products_of_step(stages: Mapping[int, TracedStage], num_microbatches: int) -> dict[int, Counts]:
    """The operations of matrix products, convolutions and fused attention in a step, by stage and dtype.

    Each product of forward counts once, and once more for the gradient of each operand that has one: that depends on
    a trained parameter. So a product of activations and weights counts three times, with a frozen weight twice, and
    where nothing before it is trained once. What rematerialisation repeats does not count.
    """
    of_trace: dict[int, Counts] = {}
    for stage in stages.values():
        if id(stage.closed) not in of_trace:
            forward = stage.forward(outputs=True, residuals=False)
            of_trace[id(stage.closed)] = count_products(forward, _differentiated(stage))
    return {
        index: {dtype: num_microbatches * count for dtype, count in of_trace[id(stage.closed)].items()}
        for index, stage in stages.items()
    }


def total_products(counts: Iterable[Mapping[str, float]]) -> Counts:
    total: Counts = {}
    for count in counts:
        for dtype, operations in count.items():
            total[dtype] = total.get(dtype, 0.0) + operations
    return total


def count_products(program: ClosedJaxpr | Jaxpr, differentiated: Collection[Var] = ()) -> Counts:
    """The operations of a program's products, once more for each operand that depends on values in `differentiated`.

    Loops and branches count as in `count_operations`.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    return _count(jaxpr, set(differentiated))[0]


def _differentiated(stage: TracedStage) -> set[Var]:
    """The values of a stage's trace that have a gradient, also those that are computed once per step."""
    if not stage.spec.has_backward:
        return set()
    # In the whole trace, since forward takes what is computed once per step (a cast to bfloat16) as an input, from
    # which it could not be told that it depends on parameters.
    found = {*stage.param_vars, *(stage.x_vars[i] for i in stage.differentiable_x)}
    _count(stage.closed.jaxpr, found)
    return found


def _count(jaxpr: Jaxpr, found: set[Var]) -> tuple[Counts, list[bool]]:
    """The operations of the products, and which outputs have a gradient. `found` has the inputs with a gradient, and
    gets all further values.
    """
    counts: Counts = {}
    for equation in jaxpr.eqns:
        of_operands = [isinstance(v, Var) and v in found for v in equation.invars]
        inside, of_outputs = _inside(equation, of_operands)
        if product := of_product(equation):
            left, right = (cast(Any, operand.aval).dtype for operand in equation.invars[:2])
            inside = {str(jnp.promote_types(left, right)): product * _times(equation, of_operands)}
        for dtype, operations in inside.items():
            counts[dtype] = counts.get(dtype, 0.0) + operations
        # Integers have no gradient, whatever they depend on.
        made = zip(equation.outvars, of_outputs, strict=True)
        found.update(v for v, has in made if has and jnp.issubdtype(cast(Any, v.aval).dtype, jnp.inexact))
    return counts, [isinstance(v, Var) and v in found for v in jaxpr.outvars]


def _times(equation: JaxprEqn, of_operands: list[bool]) -> float:
    """How often a product counts."""
    if equation.primitive.name != CUDNN_ATTENTION:
        return 1.0 + sum(of_operands[:2])
    query, key, value = of_operands[:3]
    # Two products of as many operations: queries with keys, and the scores of these with values.
    return ((1 + query + key) + (1 + (query or key) + value)) / 2


def _inside(equation: JaxprEqn, of_operands: list[bool]) -> tuple[Counts, list[bool]]:
    """The operations of the programs that an equation holds, and which of its outputs have a gradient."""
    name = equation.primitive.name
    of_outputs = [any(of_operands) and name != "stop_gradient"] * len(equation.outvars)
    parts = list(jaxprs_in_params(equation.params))
    if not parts:
        return {}, of_outputs
    if name == "cond":
        of_operands = of_operands[1:]  # the first says which branch
    counted = []
    for part in parts:
        # Elsewhere, the inputs of the program are not the operands of the equation, one by one.
        is_call = name != "while" and len(part.invars) == len(of_operands)
        given = list(of_operands) if is_call else [any(of_operands)] * len(part.invars)
        counted.append(_count_scan(equation, part, given) if name == "scan" else _count(part, _chosen(part, given)))
    if all(len(outputs) == len(of_outputs) for _, outputs in counted):
        of_outputs = [any(of_parts) for of_parts in zip(*(outputs for _, outputs in counted), strict=True)]
    counts = [count for count, _ in counted]
    if name == "cond":
        counts = [max(counts, key=lambda count: sum(count.values()))]
    total = total_products(counts)
    return {dtype: repeats(equation) * operations for dtype, operations in total.items()}, of_outputs


def _count_scan(equation: JaxprEqn, body: Jaxpr, given: list[bool]) -> tuple[Counts, list[bool]]:
    """What `_count` gives for the body of a scan. What one iteration hands to the next may have a gradient although
    its first value has none.
    """
    start, size = scan_sizes(equation)
    while True:
        counts, outputs = _count(body, _chosen(body, given))
        carried = [before or after for before, after in zip(given[start : start + size], outputs[:size], strict=True)]
        if carried == given[start : start + size]:
            return counts, outputs
        given[start : start + size] = carried


def _chosen(jaxpr: Jaxpr, given: list[bool]) -> set[Var]:
    return {v for v, has in zip(jaxpr.invars, given, strict=True) if has}
