"""Layers into stages: evenly, by hand, by cost, and what is refused."""

import re
from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshpipe.plan.partition import ALIKE, partition, partition_at, partition_by_cost, partition_evenly
from meshpipe.plan.schedules import loop, zigzag


@pytest.mark.parametrize(
    ("layers", "stages", "lengths"),
    [(4, 4, [1, 1, 1, 1]), (5, 2, [3, 2]), (7, 3, [3, 2, 2]), (6, 1, [6]), (1, 1, [1])],
)
def test_even_cuts_give_the_first_stages_the_rest(layers: int, stages: int, lengths: list[int]) -> None:
    assert [len(run) for run in partition_evenly(layers, stages)] == lengths


@given(st.integers(1, 60).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers))))
def test_even_cuts_take_every_layer_once_and_differ_by_one(sizes: tuple[int, int]) -> None:
    layers, stages = sizes
    runs = partition_evenly(layers, stages)
    assert [layer for run in runs for layer in run] == list(range(layers))
    lengths = [len(run) for run in runs]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1


def test_boundaries_are_the_first_layers_of_the_later_stages() -> None:
    assert partition_at(5, 3, (2, 3)) == (range(2), range(2, 3), range(3, 5))
    assert partition(5, 3, (2, 3)) == partition_at(5, 3, (2, 3))
    assert partition(5, 3) == partition_evenly(5, 3)
    assert partition(3, 1, ()) == (range(3),)


def test_fewer_layers_than_stages_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("Got 3 layers for 4 stages. Use fewer pipeline ranks")):
        partition(3, 4)


@pytest.mark.parametrize(("boundaries", "spelled"), [((), "0 (none)"), ((1,), "1 (1)"), ((1, 2, 3), "3 (1, 2, 3)")])
def test_the_number_of_boundaries_must_fit_the_stages(boundaries: tuple[int, ...], spelled: str) -> None:
    message = f"Got {spelled} after 0 for 3 stages. Give 2 after 0, or cut by `partition` even."
    with pytest.raises(ValueError, match=re.escape(message)):
        partition(4, 3, boundaries)


@pytest.mark.parametrize("boundaries", [(0, 2), (2, 2), (3, 2), (2, 4), (-1, 2), (2, 5)])
def test_boundaries_must_ascend_within_the_layers(boundaries: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must ascend strictly between 1 and 3, the last layer\. Got"):
        partition(4, 3, boundaries)


def slowest(costs: Sequence[float], edges: Sequence[int], ranks: Sequence[int]) -> tuple[float, float]:
    """The times of the slowest rank and the slowest stage."""
    stages = [sum(costs[a:b]) for a, b in pairwise(edges)]
    loads = dict.fromkeys(ranks, 0.0)
    for rank, time in zip(ranks, stages, strict=True):
        loads[rank] += time
    return max(loads.values()), max(stages)


@st.composite
def balancing(draw: st.DrawFn) -> tuple[list[float], tuple[int, ...]]:
    placement = draw(st.sampled_from([loop, zigzag]))
    ranks = placement(draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    times = st.one_of(st.integers(0, 3).map(float), st.floats(0.1, 5))
    return draw(st.lists(times, min_size=len(ranks), max_size=len(ranks) + 4)), ranks


@given(balancing())
def test_no_cut_has_a_faster_slowest_rank(case: tuple[list[float], tuple[int, ...]]) -> None:
    costs, ranks = case
    cut = partition_by_cost(costs, ranks)
    assert [layer for run in cut for layer in run] == list(range(len(costs)))
    rank, stage = slowest(costs, [0, *(run.stop for run in cut)], ranks)
    inner = combinations(range(1, len(costs)), len(ranks) - 1)
    every = [slowest(costs, (0, *edges, len(costs)), ranks) for edges in inner]
    least = min(time for time, _ in every)
    if len(set(ranks)) == len(ranks):
        assert rank == pytest.approx(least)
        return
    assert rank <= least * (1 + ALIKE) * (1 + 1e-9)
    assert stage <= min(time for of_rank, time in every if of_rank <= least * (1 + ALIKE)) * (1 + 1e-9)


def test_stages_below_the_slowest_are_made_equal() -> None:
    assert partition_by_cost([5.0, 1.0, 1.0, 1.0, 1.0], (0, 1, 2)) == (range(1), range(1, 3), range(3, 5))


def test_many_layers_are_cut_within_seconds() -> None:
    costs = [0.3, *[1 + (7 * i % 5) / 10 for i in range(62)], 2.5]
    cut = partition_by_cost(costs, loop(8, 2))
    rank, _ = slowest(costs, [0, *(run.stop for run in cut)], loop(8, 2))
    assert rank < 1.06 * sum(costs) / 8


def test_fewer_layers_than_stages_cannot_be_balanced() -> None:
    with pytest.raises(ValueError, match="Every stage needs a layer"):
        partition_by_cost([1.0, 2.0], (0, 1, 2))
