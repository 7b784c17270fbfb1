"""What one part of a traced program keeps for a later one: the fewest bytes from which the rest follows at little cost.

A minimum cut between what is expensive to compute and what the later part needs, as in PyTorch's AOTAutograd
(`min_cut_rematerialization_partition`); He and Yu, Transcending Runtime-Memory Tradeoffs in Checkpointing by being
Fusion Aware, MLSys 2023.
"""

from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from meshpipe.pipeline.jaxpr import LAYOUT_PRIMITIVES, nbytes, variables

ARITHMETIC_PRIMITIVES = LAYOUT_PRIMITIVES | {
    *("abs", "add", "and", "clamp", "convert_element_type", "eq", "ge", "gt", "integer_pow", "is_finite", "le", "lt"),
    *(
        "max",
        "min",
        "mul",
        "ne",
        "neg",
        "not",
        "one_minus_square",
        "or",
        "select_n",
        "sign",
        "square",
        "stop_gradient",
        "sub",
        "xor",
    ),
}
"""Operations on one element at a time that take next to no time."""

ELEMENTWISE_PRIMITIVES = ARITHMETIC_PRIMITIVES | {
    *("ceil", "cos", "div", "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "log", "log1p"),
    *("logistic", "pow", "round", "rsqrt", "sin", "sqrt", "tan", "tanh"),
}
"""Operations on one element at a time: accelerators take longer to read a value than to compute it by them."""

_LARGEST = 2**28
"""Capacities are 32-bit integers, so that bytes are counted in units of this share of their sum."""


def least_to_keep(
    jaxpr: Jaxpr,
    wanted: Iterable[Var],
    given: Collection[Var],
    repeatable: Callable[[JaxprEqn], bool],
    *,
    there: Collection[Var] = (),
    only_later: Collection[Var] = (),
) -> list[Var]:
    """The values to keep so that `wanted` can be had from them and `given` by the equations that are `repeatable`.

    Those of the fewest bytes, and of several such choices the one that repeats least; in the order of the program.
    Values that are `there` anyway (an input) are preferred to others of their size; `only_later` ones cannot be kept.
    """
    maker = {v: e for e in jaxpr.eqns for v in e.outvars}
    place: dict[Var, int] = {}
    edges: list[tuple[int, int, Var | None]] = []
    source, sink = 0, 1
    todo = [v for v in dict.fromkeys(wanted) if v not in given]
    edges += [(_after(place, v), sink, None) for v in todo]
    seen = set(todo)
    while todo:
        value = todo.pop()
        before, after = _before(place, value), _after(place, value)
        edges.append((before, after, None if value in only_later else value))
        equation = maker.get(value)
        if equation is None or not repeatable(equation):
            if value not in only_later:
                edges.append((source, before, None))
            continue
        for operand in dict.fromkeys(variables(equation.invars)):
            if operand not in given:
                edges.append((_after(place, operand), before, None))
                if operand not in seen:
                    seen.add(operand)
                    todo.append(operand)
    kept = _minimum_cut(edges, 2 + 2 * len(place), there)
    return [v for v in (*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)) if v in kept]


def _before(place: dict[Var, int], value: Var) -> int:
    return 2 + 2 * place.setdefault(value, len(place))


def _after(place: dict[Var, int], value: Var) -> int:
    return _before(place, value) + 1


def _minimum_cut(edges: Sequence[tuple[int, int, Var | None]], num_nodes: int, there: Collection[Var]) -> set[Var]:
    """The values whose edges are cut; of all minimum cuts the one nearest to the sink, node 1. None cannot be cut."""
    if not edges:
        return set()
    unit = max(1.0, sum(nbytes([v]) for _, _, v in edges if v is not None) / _LARGEST)
    capacities = [2 * max(1, round(nbytes([v]) / unit)) + (v not in there) if v is not None else 0 for _, _, v in edges]
    endless = sum(capacities) + 1
    heads, tails = [a for a, _, _ in edges], [b for _, b, _ in edges]
    data = [endless if v is None else c for (_, _, v), c in zip(edges, capacities, strict=True)]
    graph = csr_array((np.array(data, np.int32), (heads, tails)), shape=(num_nodes, num_nodes))
    left = graph - maximum_flow(graph, 0, 1).flow
    left.eliminate_zeros()
    reaching = set(breadth_first_order(left.T.tocsr(), 1, return_predecessors=False).tolist())
    return {v for a, b, v in edges if v is not None and b in reaching and a not in reaching}
