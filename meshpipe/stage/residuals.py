"""Chooses what one part of a traced program stores for a later one: few bytes, from which the rest is cheap to compute.

This is a minimum cut between what is expensive to compute and what the later part needs, as in PyTorch's AOTAutograd
(`min_cut_rematerialization_partition`); He and Yu, Transcending Runtime-Memory Tradeoffs in Checkpointing by being
Fusion Aware, MLSys 2023.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Var
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from meshpipe.stage.jaxpr import LAYOUT_PRIMITIVES, nbytes, variables

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
"""Elementwise operations that take next to no time."""

ELEMENTWISE_PRIMITIVES = ARITHMETIC_PRIMITIVES | {
    *("ceil", "cos", "div", "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "log", "log1p"),
    *("logistic", "pow", "round", "rsqrt", "sin", "sqrt", "tan", "tanh"),
}
"""Elementwise operations. On accelerators, to compute a value by them takes less time than to read it from memory."""

WRITE = 1 / 8
"""The extra cost of storing a value that XLA would otherwise compute where it is read, as a share of its bytes: XLA has
to write it for this purpose alone. It decides between values of about equal size."""

_LARGEST = 2**28
"""SciPy's maximum flow takes 32-bit integers as capacities, so costs are rounded to this fraction of their sum.
Doubled, and with the capacity that no cut can afford added to them, they still fit."""


def least_to_keep(
    jaxpr: Jaxpr,
    wanted: Iterable[Var],
    given: Collection[Var],
    repeatable: Callable[[JaxprEqn], bool],
    *,
    only_later: Collection[Var] = (),
) -> list[Var]:
    """The values to store so that `wanted` can be computed from them and `given`, by repeatable equations alone.

    They have the fewest bytes, where values that XLA does not write by itself count an eighth more. Among equal
    choices, inputs of the program are preferred, then what repeats the fewest operations. Values come in program order.

    Arguments:
        jaxpr: The program of both parts.
        wanted: The values that the later part reads.
        given: Values that the later part has anyway, at no cost.
        repeatable: Whether the later part may run an equation of the earlier part again.
        only_later: Values that the later part alone computes, which cannot be stored.
    """
    # Every value is two nodes with an edge from one to the other, whose capacity is the cost of storing the value: to
    # cut that edge is to store it. The edges from operands to results cannot be cut. Neither can those from the source,
    # which lead to the values that cannot be computed again; so these are stored, or something between them and the
    # sink.
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
    unwritten = values_not_written(jaxpr)
    costs = {v: nbytes([v]) * (1 + WRITE * (v in unwritten)) for v in place}
    kept = _minimum_cut(edges, 2 + 2 * len(place), costs, preferred=set(jaxpr.invars))
    return [v for v in (*jaxpr.invars, *(v for e in jaxpr.eqns for v in e.outvars)) if v in kept]


def values_not_written(jaxpr: Jaxpr) -> set[Var]:
    """Values that XLA computes where they are read, and so never writes to memory unless they are stored.

    These are the results of elementwise operations and rearrangements of arrays that together are no larger (within
    `WRITE`) than the result. The exponential of a matrix product is one: XLA writes the product anyway, so storing the
    product costs no further write. The sum of two activations is none: to compute it again, two arrays would be read.
    """
    sources: dict[Var, set[Var]] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in ELEMENTWISE_PRIMITIVES:
            read = set[Var]().union(*(sources.get(v, {v}) for v in variables(equation.invars)))
            sources |= {v: read for v in equation.outvars if nbytes(read) <= (1 + WRITE) * nbytes([v])}
    return set(sources)


def _before(place: dict[Var, int], value: Var) -> int:
    return 2 + 2 * place.setdefault(value, len(place))


def _after(place: dict[Var, int], value: Var) -> int:
    return _before(place, value) + 1


def _minimum_cut(
    edges: Sequence[tuple[int, int, Var | None]], num_nodes: int, costs: Mapping[Var, float], preferred: Collection[Var]
) -> set[Var]:
    """The values whose edges are cut, in the minimum cut nearest to the sink, which is node 1; node 0 is the source.

    An edge without a value cannot be cut. Of two values that cost the same, the `preferred` one is cut.
    """
    if not edges:
        return set()
    unit = max(1.0, sum(costs[v] for _, _, v in edges if v is not None)) / _LARGEST
    # Doubled, so that the 1 that makes other values dearer than preferred ones decides only between equal costs.
    capacities = [
        2 * max(1, round(costs[v] / unit)) + (v not in preferred) if v is not None else 0 for _, _, v in edges
    ]
    endless = sum(capacities) + 1
    heads, tails = [a for a, _, _ in edges], [b for _, b, _ in edges]
    data = [endless if v is None else c for (_, _, v), c in zip(edges, capacities, strict=True)]
    graph = csr_array((np.array(data, np.int32), (heads, tails)), shape=(num_nodes, num_nodes))
    # What can still reach the sink through unused capacity is on its side. That gives the cut nearest to the sink,
    # after which the fewest operations are left to repeat.
    left = graph - maximum_flow(graph, 0, 1).flow
    left.eliminate_zeros()
    reaching = set(breadth_first_order(left.T.tocsr(), 1, return_predecessors=False).tolist())
    return {v for a, b, v in edges if v is not None and b in reaching and a not in reaching}
