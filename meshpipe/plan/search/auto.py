"""Finds a plan for measured costs and a memory limit: the best in simulation of all schedules and of a search."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, product

from meshpipe.plan.graph import Graph
from meshpipe.plan.plan import Action, Op, Plan
from meshpipe.plan.schedules import SCHEDULES, loop, takes_stages, zigzag
from meshpipe.plan.search.greedy import Rule, greedy_orders
from meshpipe.plan.search.local_search import improve
from meshpipe.plan.simulate import Costs, Timeline
from meshpipe.plan.stage_memory import StageMemory, on_graph
from meshpipe.plan.validate import validate

ACTIONS_BY_RULES = 300_000
"""Actions to put in order by greedy rules, over all plans for a number of stages per rank: a few seconds at most."""

ACTIONS_BY_CHANGES = 100_000
"""Actions to simulate in the local search, over all its steps: about a second."""

STARTS = 3
"""Plans, the best so far, from which the local search starts."""

COUNTED = StageMemory(activation=1.0, kept_for_weights=1.0)
"""What a stage keeps where bytes are not given: one activation until its last use."""


class NothingFits(ValueError):
    """No plan stays within the memory limit."""

    def __init__(self, message: str, least: float):
        super().__init__(message)
        self.least = least
        """The bytes per device of the fullest rank that would be enough."""


@dataclass(frozen=True)
class Profile:
    """The costs of the stages of one cut of the model."""

    costs: Costs = field(default_factory=Costs)
    memory: Sequence[StageMemory] = ()
    """What each stage holds, in stage order; needed only with a memory limit."""
    graph: Graph | None = None
    """What the stages read of each other; None is a chain of trained stages."""

    def on_graph(self, plan: Plan) -> Plan:
        """The plan of a chain, for these stages."""
        return plan if self.graph is None else plan.on(self.graph)

    def memory_or_counts(self, num_stages: int) -> Sequence[StageMemory]:
        """What each stage holds in bytes, or in activations where bytes are not given."""
        memory = self.memory or [COUNTED] * num_stages
        return memory if self.graph is None else on_graph(memory, self.graph)


def auto_plan(
    num_ranks: int, num_microbatches: int, profiles: Mapping[int, Profile], memory_limit: float | None = None
) -> Plan:
    """The plan with the shortest step in simulation among those whose ranks hold no more bytes than the limit.

    `profiles` has the costs of the stages for each number of stages per rank that may be taken, with times in the same
    unit. No named schedule for one of these numbers that fits is faster, as all are tried, together with orders that
    greedy rules make from the costs under the limit, and small changes to the best of them. Of equally long steps it
    takes the one that another step can follow soonest, then the one that holds least, then the one of fewest actions.
    The same arguments give the same plan, so processes that are to run it together must agree on the costs. The
    schedule's name in the plan is `auto`, followed by the named schedule if that was the best.

    Raises `NothingFits`, a `ValueError`, when nothing fits; the message says how little memory would do.
    """
    assert profiles, "costs for at least one number of stages per rank"
    assert memory_limit is None or all(p.memory for p in profiles.values()), "a limit needs to know what stages keep"
    fitting = _fitting(num_ranks, num_microbatches, profiles, memory_limit)
    starts = heapq.nsmallest(STARTS, fitting, key=lambda pair: _order_of_choice(pair[0]))
    if not starts:
        raise _nothing_fits(num_ranks, profiles, memory_limit)
    ends = [_improved(timeline, profile, memory_limit) for timeline, profile in starts]
    plan = min(ends, key=_order_of_choice).plan
    validate(plan)
    return plan


def shortest_named(
    num_ranks: int, num_microbatches: int, profiles: Mapping[int, Profile], memory_limit: float | None = None
) -> float:
    """How long a step takes with the best of the named schedules that fit; infinite if none does."""
    timelines = (
        Timeline.of(plan, profile.costs, profile.memory)
        for stages_per_rank, profile in profiles.items()
        for plan in _named(num_ranks, num_microbatches, stages_per_rank, profile)
    )
    return min((t.makespan for t in timelines if _fits(t, memory_limit)), default=math.inf)


def _fitting(
    num_ranks: int, num_microbatches: int, profiles: Mapping[int, Profile], memory_limit: float | None
) -> Iterator[tuple[Timeline, Profile]]:
    for stages_per_rank, profile in sorted(profiles.items()):
        plans = chain(
            _named(num_ranks, num_microbatches, stages_per_rank, profile),
            _greedy(num_ranks, num_microbatches, stages_per_rank, profile, memory_limit),
        )
        for plan in chain.from_iterable((plan, *_joined(plan)) for plan in plans):
            timeline = Timeline.of(plan, profile.costs, profile.memory)
            if _fits(timeline, memory_limit):
                yield timeline, profile


def _named(num_ranks: int, num_microbatches: int, stages_per_rank: int, profile: Profile) -> Iterator[Plan]:
    for name, schedule in SCHEDULES.items():
        if name != "inference" and takes_stages(name, stages_per_rank):
            plan = profile.on_graph(schedule(num_ranks, num_microbatches, stages_per_rank))
            yield replace(plan, schedule=f"auto ({name})")


def _greedy(
    num_ranks: int, num_microbatches: int, stages_per_rank: int, profile: Profile, memory_limit: float | None
) -> Iterator[Plan]:
    """Plans by greedy rules, on stages dealt in turn and to and fro, with memory for more and fewer microbatches."""
    memory = profile.memory_or_counts(num_ranks * stages_per_rank)
    placements = dict.fromkeys((loop(num_ranks, stages_per_rank), zigzag(num_ranks, stages_per_rank)))
    num_actions = 3 * num_ranks * stages_per_rank * num_microbatches * len(placements)
    choices = _choices(num_ranks, num_microbatches)[: max(2, ACTIONS_BY_RULES // num_actions)]
    for ranks in placements:
        limits = _space(ranks, memory, memory_limit)
        for rule, depth in choices:
            space = _space_for(depth, ranks, memory, limits)
            orders = greedy_orders(ranks, num_microbatches, profile.costs, memory, space, rule, profile.graph)
            if orders is not None:
                plan = Plan("auto", num_microbatches, ranks, orders)
                yield _promising(plan if profile.graph is None else replace(plan, graph=profile.graph))


def _choices(num_ranks: int, num_microbatches: int) -> list[tuple[Rule, float]]:
    """Rules with the number of microbatches for whose activations a rank gets space, the most promising first."""
    split = (num_microbatches, 2 * num_ranks, 3 * num_ranks // 2, num_ranks, 0)
    wholes = list(dict.fromkeys(max(0, num_microbatches - last) for last in split))
    habits = [(False, 0.0), (False, 0.25), (True, 0.0), (False, 0.5)]
    depths = [float(num_ranks), 2.0 * num_ranks, math.inf, 1.5 * num_ranks, 0.75 * num_ranks, 0.5 * num_ranks]
    cubes = product(enumerate(wholes), enumerate(habits), enumerate(depths))
    ordered = sorted(cubes, key=lambda cube: sum(index for index, _ in cube))
    return list(dict.fromkeys((Rule(whole, *habit), depth) for (_, whole), (_, habit), (_, depth) in ordered))


def _joined(plan: Plan) -> Iterator[Plan]:
    """The plan with every I that its W directly follows in one B, which may be faster; nothing if there is none."""
    orders = []
    for order in plan.orders:
        joined: list[Action] = []
        for action in order:
            if action.op is Op.BACKWARD_WEIGHT and joined[-1] == replace(action, op=Op.BACKWARD_INPUT):
                joined[-1] = replace(action, op=Op.BACKWARD)
            else:
                joined.append(action)
        orders.append(tuple(joined))
    if tuple(orders) != plan.orders:
        yield replace(plan, schedule="auto", orders=tuple(orders))


def _space(stage_ranks: Sequence[int], memory: Sequence[StageMemory], memory_limit: float | None) -> list[float]:
    """The bytes that the limit leaves to each rank for activations."""
    limit = math.inf if memory_limit is None else memory_limit
    return [limit - always for always in _sums(stage_ranks, [stage.always for stage in memory])]


def _space_for(
    depth: float, stage_ranks: Sequence[int], memory: Sequence[StageMemory], limits: Sequence[float]
) -> list[float]:
    """Space for the activations of that many microbatches, at least one, at all stages of a rank; less at the limit."""
    each = [max(stage.activation, stage.kept_for_weights + stage.made_for_weights) for stage in memory]
    made = max(stage.made_for_weights for stage in memory)
    wanted = [max(depth, 1.0) * one + made if one else made for one in _sums(stage_ranks, each)]
    return [min(space, limit) for space, limit in zip(wanted, limits, strict=True)]


def _sums(stage_ranks: Sequence[int], numbers: Sequence[float]) -> list[float]:
    """For each rank, the sum of the numbers of its stages."""
    sums = [0.0] * (max(stage_ranks) + 1)
    for rank, number in zip(stage_ranks, numbers, strict=True):
        sums[rank] += number
    return sums


def _promising(plan: Plan) -> Plan:
    """The plan with the promise that it keeps."""
    peaks = tuple(max(plan.live_activations(rank), default=0) for rank in range(plan.num_ranks))
    return replace(plan, peak_activations=peaks)


def _fits(timeline: Timeline, memory_limit: float | None) -> bool:
    return memory_limit is None or max(timeline.peak_bytes) <= memory_limit * (1 + 1e-9)


def _order_of_choice(timeline: Timeline) -> tuple[float, ...]:
    """A sort key: less is better. Times that differ by rounding are equal."""
    held = max(timeline.peak_bytes) if timeline.memory else max(timeline.peak_activations)
    return float(f"{timeline.makespan:.9g}"), float(f"{timeline.period:.9g}"), held, len(timeline.starts)


def _improved(timeline: Timeline, profile: Profile, memory_limit: float | None) -> Timeline:
    """The plan after a local search, or as it is if that finds nothing or there is nothing to find."""
    plan = timeline.plan
    if timeline.makespan <= _least_makespan(plan, profile.costs) * (1 + 1e-9):
        return timeline
    memory = profile.memory_or_counts(plan.num_stages)
    space = _space(plan.stage_ranks, memory, memory_limit)
    changed = improve(plan, profile.costs, memory, space, ACTIONS_BY_CHANGES // (STARTS * len(plan.actions)))
    better = Timeline.of(_promising(replace(changed, schedule="auto")), profile.costs, profile.memory)
    found = float(f"{better.makespan:.9g}") < float(f"{timeline.makespan:.9g}") and _fits(better, memory_limit)
    return better if found else timeline


def _least_makespan(plan: Plan, costs: Costs) -> float:
    """No order of these stages is shorter: every rank waits for its first input, then does all its work."""
    work = [sum(map(costs.time_of, order)) for order in plan.orders]
    arrivals: list[float] = []
    for stage, rank in enumerate(plan.stage_ranks):
        delays = (
            arrivals[source]
            + costs.time(source, Op.FORWARD)
            + (costs.transfer if plan.stage_ranks[source] != rank else 0.0)
            for source in plan.graph.sources(stage)
        )
        arrivals.append(max(delays, default=0.0))
    first = (min(arrivals[stage] for stage in plan.stages_of(rank)) for rank in range(plan.num_ranks))
    return max(arrival + own for arrival, own in zip(first, work, strict=True))


def _nothing_fits(num_ranks: int, profiles: Mapping[int, Profile], memory_limit: float | None) -> NothingFits:
    least = min(
        max(_sums(ranks, [s.always + s.activation for s in profile.memory_or_counts(len(profile.memory))]))
        for stages_per_rank, profile in profiles.items()
        for ranks in (loop(num_ranks, stages_per_rank), zigzag(num_ranks, stages_per_rank))
    )
    return NothingFits(
        f"Every rank must hold its stages and what they keep of one microbatch: at least {math.ceil(least):,} bytes on "
        f"each device of the fullest rank. Got a memory limit of {memory_limit:,.0f} bytes. Raise it, or use more "
        "ranks, smaller microbatches or rematerialisation.",
        least,
    )
