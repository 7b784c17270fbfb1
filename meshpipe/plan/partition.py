"""Cuts the list of layers into stages."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

from meshpipe.errors import ArgumentError

CUTS_TRIED = 200_000
"""How many stages each search for a cut with several stages per rank may place: about half a second."""

ALIKE = 0.01
"""Times that differ by less than this share count as equal: measurements are no more exact."""


def partition_evenly(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """Contiguous runs whose lengths differ by at most one, the longer ones first.

    Raises `ValueError` when there are fewer layers than stages.
    """
    if num_layers < num_stages:
        layers = f"{num_layers} layer{'' if num_layers == 1 else 's'}"
        raise ValueError(
            f"Every stage needs a layer. Got {layers} for {num_stages} stages. "
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
        raise ArgumentError(
            "`partition` must give the first layer of every stage, where that of stage 0 is 0 and may be left out. "
            f"Got {len(boundaries)} ({_spell(boundaries)}) after 0 for {num_stages} stages. "
            f"Give {num_stages - 1} after 0, or cut by `partition` even."
        )
    edges = (0, *boundaries, num_layers)
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError(
            f"The first layers of stages must ascend strictly between 1 and {num_layers - 1}, the last layer. "
            f"Got {_spell(boundaries)}."
        )
    return tuple(range(a, b) for a, b in pairwise(edges))


def partition(num_layers: int, num_stages: int, boundaries: Sequence[int] | None = None) -> tuple[range, ...]:
    """The layers of every stage, cut at the boundaries if given, else evenly."""
    if boundaries is None:
        return partition_evenly(num_layers, num_stages)
    return partition_at(num_layers, num_stages, boundaries)


def partition_by_cost(costs: Sequence[float], stage_ranks: Sequence[int]) -> tuple[range, ...]:
    """Contiguous runs of layers such that the slowest rank takes the least time.

    With one stage per rank, the cut is exact, and the other stages are as equal as possible. With several, the cut is
    one whose slowest rank is within 1 % of the least, and whose slowest stage takes the least time, so that a pipeline
    fills fast. It is exact too, unless the search ends first (dozens of layers); then it is the best that was found.

    Arguments:
        costs: The time of each layer, 0 or more, in any unit.
        stage_ranks: The rank of each stage.

    Raises `ValueError` when there are fewer layers than stages.
    """
    partition_evenly(len(costs), len(stage_ranks))
    edges = _edges_for_slowest_stage(costs, len(stage_ranks))
    if len(set(stage_ranks)) < len(stage_ranks):
        search = _Search(costs, stage_ranks, edges)
        search.minimise()
        search.minimise(rank_limit=search.best[0] * (1 + ALIKE))
        edges = search.edges
    return tuple(range(a, b) for a, b in pairwise(edges))


def _edges_for_slowest_stage(costs: Sequence[float], num_stages: int) -> list[int]:
    """Where to cut so that the slowest stage takes the least time; among such cuts, one with the least sum of
    squares.
    """
    ends = [0.0, *accumulate(costs)]
    slowest = _best_edges(ends, num_stages, lambda before, stage: max(before, stage), float("inf"))
    limit = max(ends[b] - ends[a] for a, b in pairwise(slowest))
    return _best_edges(ends, num_stages, lambda before, stage: before + stage**2, limit)


def _best_edges(
    ends: Sequence[float], num_stages: int, total: Callable[[float, float], float], limit: float
) -> list[int]:
    """Dynamic programme over the layers of the first stages: the least total of cuts whose stages keep to the limit."""
    num_layers, nothing = len(ends) - 1, float("inf")
    best, choices = [0.0] + [nothing] * num_layers, []
    for _ in range(num_stages):
        options = [
            min(
                (
                    (total(best[start], ends[stop] - ends[start]), start)
                    for start in range(stop)
                    if ends[stop] - ends[start] <= limit
                ),
                default=(nothing, 0),
            )
            for stop in range(num_layers + 1)
        ]
        best = [least for least, _ in options]
        choices.append([start for _, start in options])
    edges = [num_layers]
    for starts in reversed(choices):
        edges.append(starts[edges[-1]])
    return edges[::-1]


class _Search:
    """Branch and bound over the cuts of several stages per rank, from a good cut."""

    def __init__(self, costs: Sequence[float], stage_ranks: Sequence[int], edges: list[int]):
        self.ends, self.ranks = [0.0, *accumulate(costs)], stage_ranks
        self.last = {rank: stage for stage, rank in enumerate(stage_ranks)}
        self.edges, self.best = edges, self._times(edges)

    def minimise(self, rank_limit: float | None = None) -> None:
        """The time of the slowest rank, or that of the slowest stage as long as no rank takes more than the limit."""
        self.limit, self.tried, self.seen = rank_limit, 0, set[tuple[object, ...]]()
        self._step_by_step()
        self._place([0], [0.0] * len(self.last), 0.0)

    def _times(self, edges: Sequence[int]) -> tuple[float, float]:
        """Of the slowest rank, and of the slowest stage."""
        stages = [self.ends[b] - self.ends[a] for a, b in pairwise(edges)]
        loads = [0.0] * len(self.last)
        for rank, time in zip(self.ranks, stages, strict=True):
            loads[rank] += time
        return max(loads), max(stages)

    def _step_by_step(self) -> None:
        """Moves single boundaries by one layer, as long as that helps."""
        improved = True
        while improved:
            improved = False
            for index in range(1, len(self.edges) - 1):
                for step in (-1, 1):
                    edges = list(self.edges)
                    edges[index] += step
                    if edges[index - 1] < edges[index] < edges[index + 1] and self._is_less(self._times(edges)):
                        self.edges, self.best, improved = edges, self._times(edges), True

    def _is_less(self, times: tuple[float, float]) -> bool:
        """Whether the times of the slowest rank and stage are better than the best by more than rounding."""
        margin, (rank, stage) = 1e-12 * self.ends[-1], times
        if self.limit is None:
            return rank < self.best[0] - margin
        return rank <= self.limit and stage < self.best[1] - margin

    def _place(self, edges: list[int], loads: list[float], slowest: float) -> None:
        """Tries all ends of the next stage that may lead to a better cut."""
        stage, start, num_layers = len(edges) - 1, edges[-1], len(self.ends) - 1
        if stage == len(self.ranks):
            self.edges, self.best = edges, (max(loads), slowest)
            return
        case = (stage, start, *loads, slowest)
        if case in self.seen:
            return
        self.seen.add(case)
        rank, left = self.ranks[stage], len(self.ranks) - stage - 1
        for stop in range(start + 1, num_layers - left + 1) if left else (num_layers,):
            self.tried += 1
            time = self.ends[stop] - self.ends[start]
            after = [load + time if r == rank else load for r, load in enumerate(loads)]
            if not self._is_less((max(after), max(slowest, time))) or self.tried > CUTS_TRIED:
                return
            if self._has_space(stage, after, self.ends[-1] - self.ends[stop]):
                self._place([*edges, stop], after, max(slowest, time))

    def _has_space(self, stage: int, loads: Sequence[float], work: float) -> bool:
        """Whether the ranks with stages to come can take the rest of the work."""
        most = self.best[0] if self.limit is None else self.limit
        space = sum(most - load for rank, load in enumerate(loads) if self.last[rank] > stage)
        return work <= space + 1e-12 * self.ends[-1]


def _spell(boundaries: Sequence[int]) -> str:
    return ", ".join(map(str, boundaries)) or "none"
