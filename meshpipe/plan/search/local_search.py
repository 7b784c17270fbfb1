"""Improves a plan by small changes, each of which moves one action of one rank earlier or later."""

import random
from collections.abc import Sequence
from dataclasses import replace

from meshpipe.plan.plan import Action, Op, Plan
from meshpipe.plan.simulate import Costs, StageMemory
from meshpipe.plan.stage_memory import bytes_of

FARTHEST = 6
"""The most places by which a change moves an action."""


def improve(plan: Plan, costs: Costs, memory: Sequence[StageMemory], space: Sequence[float], num_changes: int) -> Plan:
    """The plan after trying a number of changes and keeping each that does not make the step longer.

    Ranks hold no more bytes of activations than their space. The same arguments give the same plan, in every process.
    """
    chance = random.Random(0)
    shortest = _makespan(plan, costs)
    for _ in range(num_changes):
        rank = chance.randrange(plan.num_ranks)
        order = plan.orders[rank]
        source = chance.randrange(len(order))
        target = min(max(source + chance.randint(-FARTHEST, FARTHEST), 0), len(order) - 1)
        if not _may_move(order, source, target):
            continue
        moved = _move(order, source, target)
        if peak_bytes(moved, memory) > space[rank]:
            continue
        changed = replace(plan, orders=(*plan.orders[:rank], moved, *plan.orders[rank + 1 :]))
        makespan = _makespan(changed, costs)
        if makespan is not None and shortest is not None and makespan <= shortest:
            plan, shortest = changed, makespan
    return plan


def peak_bytes(order: Sequence[Action], memory: Sequence[StageMemory]) -> float:
    """The most bytes of activations that an order holds at once."""
    held = peak = 0.0
    for action in order:
        taken, given_back = bytes_of(memory[action.stage], action)
        held += taken
        peak = max(peak, held)
        held -= given_back
    return peak


def _makespan(plan: Plan, costs: Costs) -> float | None:
    """None if ranks wait for each other for ever."""
    starts = plan.start_times(costs.time_of, costs.transfer)
    if len(starts) < sum(map(len, plan.orders)):
        return None
    return max(starts[order[-1]] + costs.time_of(order[-1]) for order in plan.orders)


def _may_move(order: Sequence[Action], source: int, target: int) -> bool:
    """Whether the action passes none that it must follow or go before on its own rank."""
    action = order[source]
    passed = order[target:source] if target < source else order[source + 1 : target + 1]
    return target != source and not any(_in_order(action, other) for other in passed)


def _in_order(one: Action, other: Action) -> bool:
    if one.stage != other.stage:
        return False
    same_kind = (one.op is Op.FORWARD) == (other.op is Op.FORWARD)
    return one.microbatch == other.microbatch or same_kind


def _move(order: Sequence[Action], source: int, target: int) -> tuple[Action, ...]:
    actions = list(order)
    actions.insert(target, actions.pop(source))
    return tuple(actions)
