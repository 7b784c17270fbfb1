"""Simulates a plan for given times of each kind of work: when actions run, how long ranks idle, and what they hold."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from meshpipe.plan.graph import Graph
from meshpipe.plan.memory_curve import MemoryCurve
from meshpipe.plan.plan import Action, Op, Plan
from meshpipe.plan.shared_cores import Sharing, shared_times
from meshpipe.plan.stage_memory import StageMemory as StageMemory
from meshpipe.plan.validate import validate

DEFAULT_TIMES: Mapping[Op, float] = {
    Op.FORWARD: 1.0,
    Op.BACKWARD: 2.0,
    Op.BACKWARD_INPUT: 1.0,
    Op.BACKWARD_WEIGHT: 1.0,
}
"""Default times, for layers that are mostly matrix products: backward has two for each one of forward."""


@dataclass(frozen=True)
class Costs:
    """Times, all in the same unit. Raises `ValueError` when one is negative or not finite."""

    times: Mapping[Op | tuple[int, Op], float] = field(default_factory=dict)
    """The time of each (stage, op), or of an op at all other stages; `DEFAULT_TIMES` has what is left out."""
    transfer: float = 0.0
    """The time from the end of an action until another rank has its result. Transfers overlap with all other work."""
    sharing: Sharing | None = None
    """How ranks share cores; times are then those with all ranks busy. None is ranks of their own."""

    def __post_init__(self) -> None:
        for what, time in (*self.times.items(), ("transfer", self.transfer)):
            if not 0 <= time < math.inf:
                raise ValueError(f"A time must be 0 or more, and finite. Got {time} for {what}.")

    def time_of(self, action: Action) -> float:
        return self.time(action.stage, action.op)

    def time(self, stage: int, op: Op) -> float:
        at_stage = self.times.get((stage, op))
        return at_stage if at_stage is not None else self.times.get(op, DEFAULT_TIMES[op])

    @classmethod
    def of_parts(cls, stages_per_rank: int, transfer: float = 0.0, graph: Graph | None = None) -> "Costs":
        """The default times for all layers of a rank, of its equal stages each: so plans for any number compare.

        A stage of the graph that has a backward and is not trained has only the input part.
        """
        times: dict[Op | tuple[int, Op], float] = {op: t / stages_per_rank for op, t in DEFAULT_TIMES.items()}
        for stage, is_trained in enumerate(() if graph is None else graph.trains):
            if not is_trained:
                times |= {(stage, Op.BACKWARD): times[Op.BACKWARD_INPUT], (stage, Op.BACKWARD_WEIGHT): 0.0}
        return cls(times, transfer)


@dataclass(frozen=True)
class Timeline:
    """When each action of a plan starts and ends, from time 0, in the unit of the costs."""

    plan: Plan
    starts: Mapping[Action, float]
    ends: Mapping[Action, float]
    memory: Sequence[StageMemory] = ()
    """What each stage holds, in stage order; empty if it was not given."""
    transfer: float = 0.0
    """The time until another rank has the result of an action."""
    late: Collection[str] = frozenset()
    """The values that wait on the rank of their source until another rank first reads them, as `lower` moves them."""

    @classmethod
    def of(
        cls, plan: Plan, costs: Costs, memory: Sequence[StageMemory] = (), late: Collection[str] = frozenset()
    ) -> "Timeline":
        """The timeline of a plan that is known to be valid."""
        assert len(memory) in (0, plan.num_stages), "the memory of every stage, or of none"
        if costs.sharing is not None:
            starts, ends = shared_times(plan, costs.time_of, costs.transfer, costs.sharing)
        else:
            starts = plan.start_times(costs.time_of, costs.transfer)
            ends = {action: start + costs.time_of(action) for action, start in starts.items()}
        return cls(plan, starts, ends, memory, costs.transfer, late)

    @cached_property
    def makespan(self) -> float:
        return max(self.ends.values())

    @cached_property
    def period(self) -> float:
        """The time from step to step if steps follow each other and no rank waits for another between them."""
        return max(
            self.ends[order[-1]] - self.starts[order[0]] for order in self.plan.orders if order[0] in self.starts
        )

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """The time that each rank computes."""
        return tuple(
            sum(self.ends[action] - self.starts[action] for action in order if action in self.starts)
            for order in self.plan.orders
        )

    @property
    def num_ranks(self) -> int:
        """The ranks whose times are known: all, unless it was measured in one of several processes."""
        return sum(order[0] in self.starts for order in self.plan.orders)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of the makespan, over all ranks, 0 to 1; 0 if everything takes no time."""
        return max(0.0, 1 - sum(self.busy) / (self.makespan * self.num_ranks)) if self.makespan else 0.0

    @property
    def bubble_between_steps(self) -> float:
        """The idle share of `period`, 0 to 1, where the next step can begin before this one has ended."""
        return max(0.0, 1 - sum(self.busy) / (self.period * self.num_ranks)) if self.period else 0.0

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """The most activations that each rank holds at once, counted as `Plan.peak_activations` counts them."""
        return tuple(max(self.plan.live_activations(rank), default=0) for rank in range(self.plan.num_ranks))

    def memory_curve(self, rank: int) -> list[tuple[float, float]]:
        """Times at which the bytes that each device of the rank holds change, in order, with the bytes from then on.

        Space is taken when an action starts and given back when it ends. A value that moves has space on both sides
        from the end of its action until it has arrived; one that is late, while it moves. What a program needs inside
        itself is counted as far as the memory of the stages has it.
        """
        assert self.memory, "simulate the plan with the memory of its stages"
        return MemoryCurve(rank, self.plan, self.starts, self.ends, self.memory, self.transfer, self.late).points()

    @cached_property
    def peak_bytes(self) -> tuple[float, ...]:
        """The most bytes that a device of the rank holds at once."""
        return tuple(max(held for _, held in self.memory_curve(rank)) for rank in range(self.plan.num_ranks))


def simulate(
    plan: Plan,
    costs: Costs | None = None,
    memory: Sequence[StageMemory] = (),
    late: Collection[str] = frozenset(),
) -> Timeline:
    """The timeline of a plan whose ranks start each action of their order as early as they can.

    Arguments:
        plan: The plan; it is checked.
        costs: The times of actions and transfers; None takes the default times.
        memory: What each stage holds, in stage order; empty predicts no memory.
        late: The values that move only when another rank first reads them.

    Raises `PlanError` when the plan is not valid.
    """
    validate(plan)
    return Timeline.of(plan, costs or Costs.of_parts(1, graph=plan.graph), memory, late)
