"""Bytes that move in a step, counted in the program."""

import pytest

from meshpipe.plan.graph import Graph, Value, chain
from meshpipe.plan.lower import lower
from meshpipe.plan.schedules import SCHEDULES, forwards_of, make_plan, takes_stages
from meshpipe.plan.simulate import StageMemory
from meshpipe.plan.traffic import Traffic, traffic
from tests.plan.random_graphs import encoder_decoder


def memory_of(graph: Graph, memory: float, other: float) -> list[StageMemory]:
    """`memory` is the size of values with a name, and `other` that of those without."""
    inputs = [tuple(memory if v.name else other for v in graph.inputs(s)) for s in range(graph.num_stages)]
    return [StageMemory(0, inputs=sizes, input_gradients=sizes) for sizes in inputs]


def total(graph: Graph, name: str, num_ranks: int, memory: float, other: float) -> float:
    plan = make_plan(name, num_ranks, 4, graph.num_stages // num_ranks).on(graph)
    return sum(moved.total for moved in traffic(lower(plan), memory_of(graph, memory, other)).values())


def test_a_value_moves_once_per_rank_and_each_gradient_back() -> None:
    graph = encoder_decoder(8)
    plan = make_plan("1f1b", 8, 3).on(graph)
    found = traffic(lower(plan), memory_of(graph, 5.0, 2.0))
    memory = next(value for value in graph.values if value.name)
    assert found[memory] == Traffic(forward=4 * 3 * 5, backward=4 * 3 * 5, moves=12, moves_back=12)
    others = [moved for value, moved in found.items() if value is not memory]
    assert others == [Traffic(forward=3 * 2, backward=3 * 2, moves=3, moves_back=3)] * 6


def test_what_stays_on_its_rank_does_not_move() -> None:
    graph = encoder_decoder(8)
    plan = make_plan("interleaved-1f1b", 2, 4).on(encoder_decoder(4))
    found = traffic(lower(plan), memory_of(plan.graph, 5.0, 2.0))
    memory = next(value for value in plan.graph.values if value.name)
    # Made on rank 1; read by stage 2 on rank 0, and by stage 3 on its own.
    assert found[memory] == Traffic(forward=4 * 5, backward=4 * 5, moves=4, moves_back=4)
    assert total(graph, "gpipe", 1, 5.0, 2.0) == 0


def test_frozen_stages_get_no_gradients() -> None:
    plan = make_plan("1f1b", 3, 2).on(Graph((False, True, True), chain(3).values))
    first, second = traffic(lower(plan), memory_of(plan.graph, 0.0, 2.0)).values()
    assert first == Traffic(forward=4, backward=0, moves=2, moves_back=0)
    assert second == Traffic(forward=4, backward=4, moves=2, moves_back=2)
    assert all(
        moved.backward == 0 for moved in traffic(lower(forwards_of(plan)), memory_of(plan.graph, 0.0, 2.0)).values()
    )


@pytest.mark.parametrize("name", [name for name in SCHEDULES if takes_stages(name, 2) and name != "inference"])
def test_an_encoder_decoder_moves_less_than_its_pytree_does(name: str) -> None:
    """Of eight stages on four ranks. As a chain, every boundary carries the text, and after the encoder the memory."""
    carried = Graph((True,) * 8, tuple(Value("", stage, (stage + 1,)) for stage in range(7)))
    plan = make_plan(name, 4, 4, 2).on(carried)
    sizes = [(1.0 if stage <= 4 else 2.0) + 1.0 for stage in range(8)]  # the other text, and memory or both
    memory = [StageMemory(0, inputs=(size,), input_gradients=(size,)) for size in sizes]
    chained = sum(moved.total for moved in traffic(lower(plan), memory).values())
    assert total(encoder_decoder(8), name, 4, 1.0, 1.0) < chained


def test_a_long_memory_that_few_ranks_share_moves_at_most_half_of_what_its_pytree_does() -> None:
    """Two encoder stages, six of the decoder, on two ranks in turns; the source is eight times as long as the target.
    The memory moves to the other rank once, and the chain carries it over every boundary.
    """
    source, target = 8.0, 1.0
    values = [
        Value("", 0, (1,)),
        Value("memory", 1, tuple(range(2, 8))),
        *(Value("", s, (s + 1,)) for s in range(2, 7)),
    ]
    sizes = {value: source if value.source < 2 else target for value in values}
    graph = Graph((True,) * 8, tuple(values))
    carried = chain(8)
    of_carried = {value: source + (target if value.source >= 2 else 0) for value in carried.values}

    def moved(graph: Graph, sizes: dict[Value, float]) -> float:
        inputs = [tuple(sizes[value] for value in graph.inputs(s)) for s in range(8)]
        plan = make_plan("interleaved-1f1b", 2, 8, 4).on(graph)
        memory = [StageMemory(0, inputs=size, input_gradients=size) for size in inputs]
        return sum(found.total for found in traffic(lower(plan), memory).values())

    assert moved(graph, sizes) <= 0.5 * moved(carried, of_carried)
