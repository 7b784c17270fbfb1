"""Simulates ranks that share the cores of their hosts: what idle ranks leave, busy ones use."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from meshpipe.plan.lower import order_actions
from meshpipe.plan.plan import Action, Plan


@dataclass(frozen=True)
class Sharing:
    """How ranks share hosts. Raises `ValueError` for less than one rank, or slower than with others."""

    ranks_per_host: int
    """As many ranks can be busy at once without slowing each other down, or more than a step has."""
    alone: float
    """How many times as fast a rank is, at most, while others idle."""
    in_turn: bool = False
    """Whether a host runs one program at a time, in the order in which they are started. XLA does so with programs of
    several virtual CPU devices, since they may wait for each other inside."""

    def __post_init__(self) -> None:
        if self.ranks_per_host < 1 or not self.alone >= 1:
            raise ValueError(f"Sharing needs at least 1 rank, and 1 as its speed. Got {self}.")

    def speed(self, busy: int, alone: float | None = None) -> float:
        """How many times as fast each of so many busy ranks of a host is, as when all are busy.

        `alone` is that of the work of a rank, where it is known.
        """
        return min(self.alone if alone is None else alone, self.ranks_per_host / busy)


def shared_times(
    plan: Plan,
    duration: Callable[[Action], float],
    alone: Callable[[Action], float],
    transfer: float,
    sharing: Sharing,
) -> tuple[dict[Action, float], dict[Action, float]]:
    """When each action starts and ends, as `Plan.start_times` has it, with durations as with all ranks of a host busy,
    and with all others of it idle.
    """
    if sharing.in_turn:
        return _times_in_turn(plan, alone, transfer, sharing.ranks_per_host)
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
        speeds = {}
        for rank, busy in _busy_beside(left, sharing.ranks_per_host).items():
            action = plan.orders[rank][cursors[rank]]
            speeds[rank] = sharing.speed(busy, duration(action) / alone(action) if alone(action) else None)
        next_end = min((now + work / speeds[rank] for rank, work in left.items()), default=math.inf)
        then = min(next_end, next_start)
        for rank in list(left):
            left[rank] -= (then - now) * speeds[rank]
            if left[rank] <= 1e-12 * then:
                ends[plan.orders[rank][cursors[rank]]] = then
                cursors[rank] += 1
                del left[rank]
        now = then


def _times_in_turn(
    plan: Plan, alone: Callable[[Action], float], transfer: float, ranks_per_host: int
) -> tuple[dict[Action, float], dict[Action, float]]:
    starts: dict[Action, float] = {}
    ends: dict[Action, float] = {}
    free_at: dict[int, float] = defaultdict(float)  # of a host
    for action in order_actions(plan):
        rank = plan.stage_ranks[action.stage]
        host = rank // ranks_per_host
        starts[action] = max(free_at[host], _ready_at(plan, action, rank, ends, transfer))
        ends[action] = free_at[host] = starts[action] + alone(action)
    return starts, ends


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
