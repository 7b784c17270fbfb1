"""Simulates ranks that share the cores of their hosts: what idle ranks leave, busy ones use."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from meshpipe.plan.plan import Action, Plan


@dataclass(frozen=True)
class Sharing:
    """How ranks share hosts. Raises `ValueError` for less than one rank, or slower than with others."""

    ranks_per_host: int
    """As many ranks can be busy at once without slowing each other down, or more than a step has."""
    alone: float
    """How many times as fast a rank is, at most, while others idle."""

    def __post_init__(self) -> None:
        if self.ranks_per_host < 1 or not self.alone >= 1:
            raise ValueError(f"Sharing needs at least 1 rank, and 1 as its speed. Got {self}.")

    def speed(self, busy: int) -> float:
        """How many times as fast each of so many busy ranks of a host is, as when all are busy."""
        return min(self.alone, self.ranks_per_host / busy)


def shared_times(
    plan: Plan, duration: Callable[[Action], float], transfer: float, sharing: Sharing
) -> tuple[dict[Action, float], dict[Action, float]]:
    """When each action starts and ends, as `Plan.start_times` has it, with durations as with all ranks busy."""
    starts: dict[Action, float] = {}
    ends: dict[Action, float] = {}
    cursors = [0] * plan.num_ranks
    left: dict[int, float] = {}  # of the action that a rank runs
    now = 0.0
    while True:
        next_start = math.inf
        for rank, order in enumerate(plan.orders):
            if rank in left or cursors[rank] == len(order):
                continue
            action = order[cursors[rank]]
            ready = _ready_at(plan, action, rank, ends, transfer)
            if ready <= now:
                starts[action], left[rank] = now, duration(action)
            else:
                next_start = min(next_start, ready)
        if not left and next_start == math.inf:
            return starts, ends
        speeds = {rank: sharing.speed(count) for rank, count in _busy_beside(left, sharing.ranks_per_host).items()}
        next_end = min((now + work / speeds[rank] for rank, work in left.items()), default=math.inf)
        then = min(next_end, next_start)
        for rank in list(left):
            left[rank] -= (then - now) * speeds[rank]
            if left[rank] <= 1e-12 * then:
                ends[plan.orders[rank][cursors[rank]]] = then
                cursors[rank] += 1
                del left[rank]
        now = then


def _ready_at(plan: Plan, action: Action, rank: int, ends: dict[Action, float], transfer: float) -> float:
    """When all that the action reads is there; infinite while that is not known."""
    ready = 0.0
    for need in plan.dependencies(action):
        if need not in ends:
            return math.inf
        ready = max(ready, ends[need] + (transfer if plan.stage_ranks[need.stage] != rank else 0.0))
    return ready


def _busy_beside(ranks: dict[int, float], ranks_per_host: int) -> dict[int, int]:
    """How many ranks of the same host are busy, for each that is."""
    hosts = [rank // ranks_per_host for rank in ranks]
    return {rank: hosts.count(host) for rank, host in zip(ranks, hosts, strict=True)}
