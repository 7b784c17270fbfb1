"""Estimates the memory that XLA needs for a traced program beside what it reads and returns."""

from collections import defaultdict
from math import prod
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

_WRITTEN = ("dot_general", "conv_general_dilated", "gather", "scatter-add", "sort", "cumsum", "reduce_window")
"""What XLA does not fuse with the operations that read it: its result is in memory, as are those of inner programs."""
_SAME_BYTES = ("reshape", "squeeze", "expand_dims", "stop_gradient", "optimization_barrier")
"""What gives the same bytes in memory another shape."""
_READS_MEMORY = ("dot_general", "conv_general_dilated")
"""What reads its operands from memory, so what makes them writes them there."""


def temporary_bytes(program: ClosedJaxpr | Jaxpr) -> float:
    """The most bytes that exist at once of what the program makes and does not return, if it runs in order.

    Only what products, convolutions and the like read and write counts: all other work is taken to be fused with that.
    What an inner program needs, such as that of a loop, comes on top of what exists around it.
    """
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    returned = {v for v in jaxpr.outvars if isinstance(v, Var)}
    written = _written(jaxpr) - returned
    last = _last_reads(jaxpr, written)
    ends: dict[int, float] = defaultdict(float)
    live = most = 0.0
    for place, equation in enumerate(jaxpr.eqns):
        for out in equation.outvars:
            if out in written:
                live += _nbytes(out)
                ends[last.get(out, place)] += _nbytes(out)
        inner = (
            max(map(temporary_bytes, jaxprs_in_params(equation.params)), default=0.0) if _has_program(equation) else 0
        )
        most = max(most, live + inner)
        live -= ends.pop(place, 0.0)
    return most


def _has_program(equation: JaxprEqn) -> bool:
    """Whether it runs another program; reductions hold one too, for two elements."""
    is_reduction = equation.primitive.name.startswith(("reduce", "scatter"))
    return not is_reduction and next(iter(jaxprs_in_params(equation.params)), None) is not None


def _written(jaxpr: Jaxpr) -> set[Var]:
    found: set[Var] = set()
    for equation in reversed(jaxpr.eqns):
        name = equation.primitive.name
        if name in _SAME_BYTES and equation.outvars[0] in found:
            found.discard(equation.outvars[0])
            found.update(_variables(equation))
        elif name in _WRITTEN or _has_program(equation):
            found.update(equation.outvars)
        if name in _READS_MEMORY:
            found.update(_variables(equation))
    return found.difference(jaxpr.invars, jaxpr.constvars)


def _variables(equation: JaxprEqn) -> list[Var]:
    return [v for v in equation.invars if isinstance(v, Var)]


def _last_reads(jaxpr: Jaxpr, written: set[Var]) -> dict[Var, int]:
    """The place of the last equation that reads each value, also by way of values that are never written."""
    last: dict[Var, int] = {}
    for place in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[place]
        fused = [last[out] for out in equation.outvars if out not in written and out in last]
        read_at = max([place, *fused])
        for v in equation.invars:
            if not isinstance(v, Literal):
                last[v] = max(last.get(v, 0), read_at)
    return last


def _nbytes(value: Any) -> float:
    aval = value.aval
    return float(prod(aval.shape) * aval.dtype.itemsize) if hasattr(aval, "dtype") else 0.0
