"""Finds the outputs of a traced program that are inputs, handed on unchanged through calls, loops and branches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

_UNCHANGED = frozenset({"copy", "copy_p", "optimization_barrier", "sharding_constraint", "reshard", "pvary", "pcast"})
"""Operations whose results are their operands, one for one."""

Value = tuple[int, tuple[int, ...]]
"""An input by number, and the order of its dims: two transpositions may cancel out."""


def forwarded(jaxpr: Jaxpr) -> list[int | None]:
    """For each output the number of the input that it is, whatever the values; None where it is computed.

    Unknown operations count as computing, so the answer errs towards None: a caller then treats a value as written that
    is not, and never the reverse.
    """
    values: dict[Var, Value] = {v: (i, _in_order(v)) for i, v in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "transpose":
            _transpose(equation, values)
            continue
        for result, operand in zip(equation.outvars, _operands(equation), strict=True):
            source = None if operand is None else equation.invars[operand]
            if isinstance(source, Var) and source in values:
                values[result] = values[source]
    found = [values.get(v) if isinstance(v, Var) else None for v in jaxpr.outvars]
    return [
        None if value is None or value[1] != _in_order(v) else value[0]
        for value, v in zip(found, jaxpr.outvars, strict=True)
    ]


def _in_order(value: Any) -> tuple[int, ...]:
    return tuple(range(_rank(value)))


def _rank(value: Any) -> int:
    return getattr(value.aval, "ndim", 0)


def _transpose(equation: JaxprEqn, values: dict[Var, Value]) -> None:
    (operand,), (result,) = equation.invars, equation.outvars
    if isinstance(operand, Var) and operand in values:
        source, dims = values[operand]
        values[result] = source, tuple(dims[i] for i in equation.params["permutation"])


def _operands(equation: JaxprEqn) -> Sequence[int | None]:
    """For each result of an equation the number of the operand that it is; None where it is computed."""
    name = equation.primitive.name
    if name in _UNCHANGED:
        return range(len(equation.outvars))
    if name in _LOOPS:
        return _LOOPS[name](equation)
    inner = next((_open(p) for p in equation.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)), None)
    if inner is None or (len(inner.invars), len(inner.outvars)) != (len(equation.invars), len(equation.outvars)):
        return [None] * len(equation.outvars)
    results = forwarded(inner)
    # `jax.shard_map` cuts operands and joins results; a part that is handed on is the whole operand only if both are
    # done in the same way.
    specs = equation.params.get("in_specs"), equation.params.get("out_specs")
    if None in specs:
        return results
    ins, outs = (tuple(of) for of in specs if of is not None)
    return [i if i is not None and ins[i] == outs[k] else None for k, i in enumerate(results)]


def _scan(equation: JaxprEqn) -> list[int | None]:
    """Tells carries from slices by their ranks, since the names of a scan's parameters differ between JAX versions."""
    inner = _open(equation.params["jaxpr"])
    results = forwarded(inner)
    sliced = [_rank(whole) > _rank(part) for whole, part in zip(equation.invars, inner.invars, strict=True)]
    stacked = [_rank(whole) > _rank(part) for whole, part in zip(equation.outvars, inner.outvars, strict=True)]
    # A carry is unchanged only if the body hands it on in the place where it takes it: two carries that change places
    # are inputs of the body as well.
    constants = sliced.count(False) - stacked.count(False)
    return [
        i if i is not None and (sliced[i] if stacked[k] else i == constants + k) else None
        for k, i in enumerate(results)
    ]


def _while(equation: JaxprEqn) -> list[int | None]:
    params = equation.params
    constants, before = params["body_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    results = forwarded(_open(params["body_jaxpr"]))
    return [before + k if i == constants + k else None for k, i in enumerate(results)]


def _cond(equation: JaxprEqn) -> list[int | None]:
    # Which branch runs is known only at run time, so all must agree.
    branches = [forwarded(_open(branch)) for branch in equation.params["branches"]]
    return [None if i is None or len(set(of)) > 1 else i + 1 for of in zip(*branches, strict=True) for i in of[:1]]


_LOOPS: Mapping[str, Callable[[JaxprEqn], list[int | None]]] = {"scan": _scan, "while": _while, "cond": _cond}


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
