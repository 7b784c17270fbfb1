"""What a plan would cost: when every action runs if each kind of work takes a given time, and what idles meanwhile."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from meshpipe.pipeline.plan import Action, Op, Plan
from meshpipe.pipeline.validate import validate

DEFAULT_TIMES: Mapping[Op, float] = {
    Op.FORWARD: 1.0,
    Op.BACKWARD: 2.0,
    Op.BACKWARD_INPUT: 1.0,
    Op.BACKWARD_WEIGHT: 1.0,
}
"""Of layers that are mostly matrix products: backward has two of them for each of forward's."""


@dataclass(frozen=True)
class Costs:
    """Times in any one unit. Raises `ValueError` when one is negative or not finite."""

    times: Mapping[Op | tuple[int, Op], float] = field(default_factory=dict)
    """Time of each (stage, op), or of an op at all other stages; what is left out is taken from `DEFAULT_TIMES`."""
    transfer: float = 0.0
    """From the end of an action until another rank has its result; transfers run beside computation and each other."""

    def __post_init__(self) -> None:
        for what, time in (*self.times.items(), ("transfer", self.transfer)):
            if not 0 <= time < math.inf:
                raise ValueError(f"A time must be 0 or more, and finite. Got {time} for {what}.")

    def time_of(self, action: Action) -> float:
        at_stage = self.times.get((action.stage, action.op))
        return at_stage if at_stage is not None else self.times.get(action.op, DEFAULT_TIMES[action.op])


@dataclass(frozen=True)
class Timeline:
    """When each action of a plan starts and ends, from time 0, in the unit of the costs."""

    plan: Plan
    starts: Mapping[Action, float]
    ends: Mapping[Action, float]

    @cached_property
    def makespan(self) -> float:
        return max(self.ends.values())

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank computes."""
        return tuple(sum(self.ends[action] - self.starts[action] for action in order) for order in self.plan.orders)

    @property
    def bubble_fraction(self) -> float:
        """The share of the makespan in which ranks are idle, over all of them; 0 if everything takes no time."""
        return max(0.0, 1 - sum(self.busy) / (self.makespan * self.plan.num_ranks)) if self.makespan else 0.0

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """The most activations that each rank holds at once, counted as `Plan.peak_activations` counts them."""
        return tuple(max(self.plan.live_activations(rank), default=0) for rank in range(self.plan.num_ranks))


def simulate(plan: Plan, costs: Costs | None = None) -> Timeline:
    """The timeline of a plan whose ranks start each action of their order as early as they can.

    Raises `PlanError` when the plan is not valid.
    """
    validate(plan)
    costs = costs or Costs()
    starts = plan.start_times(costs.time_of, costs.transfer)
    return Timeline(plan, starts, {action: start + costs.time_of(action) for action, start in starts.items()})
