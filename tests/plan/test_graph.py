"""Graphs of stages: what each stage reads and makes, and which stages have a backward."""

import re

import pytest

from meshpipe.plan.graph import Graph, Value, chain

MEMORY = Value("memory", 0, (2, 3))
BETWEEN = tuple(Value("", stage, (stage + 1,)) for stage in (1, 2))


def test_a_chain_has_a_value_between_neighbours() -> None:
    graph = chain(3)
    assert graph.values == (Value("", 0, (1,)), Value("", 1, (2,)))
    assert [graph.inputs(stage) for stage in range(3)] == [(), graph.values[:1], graph.values[1:]]
    assert [graph.outputs(stage) for stage in range(3)] == [graph.values[:1], graph.values[1:], ()]
    assert all(map(graph.has_backward, range(3)))
    assert all(map(graph.has_gradient, graph.values))
    assert graph.is_chain
    assert chain(1) == Graph((True,), ())


def test_a_stage_reads_values_in_the_order_of_their_sources() -> None:
    graph = Graph((True,) * 4, (MEMORY, *BETWEEN))
    assert [graph.inputs(stage) for stage in range(4)] == [(), (), (MEMORY, BETWEEN[0]), (MEMORY, BETWEEN[1])]
    assert graph.outputs(0) == (MEMORY,)
    assert not graph.is_chain


def test_stages_before_all_that_is_trained_have_no_backward() -> None:
    graph = Graph((False, True, False, True), (MEMORY, *BETWEEN))
    assert [graph.has_backward(stage) for stage in range(4)] == [False, True, True, True]
    assert [graph.has_gradient(value) for value in graph.values] == [False, True, True]
    assert not Graph((False, True), chain(2).values).is_chain


@pytest.mark.parametrize(
    ("values", "phrase"),
    [
        ([Value("a", 1, ())], "must ascend, and there must be one"),
        ([Value("a", 0, (2, 1))], "must ascend, and there must be one"),
        ([Value("a", 1, (1,))], "from one of the 3 stages to later ones"),
        ([Value("a", 1, (3,))], "from one of the 3 stages to later ones"),
        ([Value("", 0, (2,))], "without a name goes to the next stage alone"),
        ([Value("a", 0, (1,)), Value("a", 1, (2,))], "needs a name of its own"),
        ([Value("", 0, (1,)), Value("", 0, (1,))], "needs a name of its own"),
        ([Value("", 1, (2,)), Value("", 0, (1,))], "in the order of the stages"),
    ],
)
def test_what_is_no_graph(values: list[Value], phrase: str) -> None:
    with pytest.raises(ValueError, match=re.escape(phrase)):
        Graph((True,) * 3, tuple(values))
