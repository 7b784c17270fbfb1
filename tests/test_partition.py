"""Layers into stages: evenly, by hand, and what is refused."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshpipe.partition import partition, partition_at, partition_evenly


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
    with pytest.raises(ValueError, match=re.escape("Got 3 layer(s) for 4 stages. Use fewer pipeline ranks")):
        partition(3, 4)


@pytest.mark.parametrize(("boundaries", "spelled"), [((), "0 (none)"), ((1,), "1 (1)"), ((1, 2, 3), "3 (1, 2, 3)")])
def test_the_number_of_boundaries_must_fit_the_stages(boundaries: tuple[int, ...], spelled: str) -> None:
    message = f"Got {spelled} for 3 stages. Give 2 layer indices, or leave boundaries out"
    with pytest.raises(ValueError, match=re.escape(message)):
        partition(4, 3, boundaries)


@pytest.mark.parametrize("boundaries", [(0, 2), (2, 2), (3, 2), (2, 4), (-1, 2), (2, 5)])
def test_boundaries_must_ascend_within_the_layers(boundaries: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must ascend strictly between 1 and 3, the last layer\. Got"):
        partition(4, 3, boundaries)
