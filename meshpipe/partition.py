"""Cutting the list of layers into stages."""

from collections.abc import Sequence
from itertools import pairwise


def partition_evenly(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Contiguous runs whose lengths differ by at most one, the longer ones first.

    Raises `ValueError` when there are fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ValueError(
            f"Every stage needs a layer. Got {num_layers} layer(s) for {num_stages} stages. "
            "Use fewer pipeline ranks or stages per rank, or cut the model into more layers."
        )
    length, longer = divmod(num_layers, num_stages)
    starts = [stage * length + min(stage, longer) for stage in range(num_stages + 1)]
    return tuple(range(a, b) for a, b in pairwise(starts))


def partition_at(num_layers: int, num_stages: int, boundaries: Sequence[int]) -> tuple[range, ...]:
    """Runs that begin at layer 0 and at each boundary, e.g. boundaries 2 and 3 of 5 layers give 0-1, 2 and 3-4.

    Raises `ValueError` when the number of boundaries is not one less than the stages, or they do not ascend within the
    layers.
    """
    if len(boundaries) != num_stages - 1:
        raise ValueError(
            f"Boundaries must be one fewer than stages. Got {len(boundaries)} ({_spell(boundaries)}) for {num_stages} "
            f"stages. Give {num_stages - 1} layer indices, or leave boundaries out to cut evenly."
        )
    edges = (0, *boundaries, num_layers)
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError(
            f"Boundaries must ascend strictly between 1 and {num_layers - 1}, the last layer. "
            f"Got {_spell(boundaries)}. Each is the first layer of a stage."
        )
    return tuple(range(a, b) for a, b in pairwise(edges))


def partition(num_layers: int, num_stages: int, boundaries: Sequence[int] | None = None) -> tuple[range, ...]:
    """The layers of every stage: at the boundaries where they are given, else evenly."""
    if boundaries is None:
        return partition_evenly(num_layers, num_stages)
    return partition_at(num_layers, num_stages, boundaries)


def _spell(boundaries: Sequence[int]) -> str:
    return ", ".join(map(str, boundaries)) or "none"
