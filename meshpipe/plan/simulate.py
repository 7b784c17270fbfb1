"""Simulates a plan for given times of each kind of work: when actions run, how long ranks idle, and what they hold."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

from meshpipe.plan.plan import Action, Op, Plan
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
    def of_parts(cls, stages_per_rank: int, transfer: float = 0.0) -> "Costs":
        """The default times for all layers of a rank, of its equal stages each: so plans for any number compare."""
        return cls({op: time / stages_per_rank for op, time in DEFAULT_TIMES.items()}, transfer)


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage holds on each device of its rank, per microbatch unless the field says otherwise."""

    activation: float
    """From F until B, or until I."""
    kept_for_weights: float = 0.0
    """The part of `activation` that stays until W where backward is split."""
    made_for_weights: float = 0.0
    """What I adds to it, until W."""
    always: float = 0.0
    """For the whole step: parameters, gradients, optimizer state and the batch."""
    input: float = 0.0
    """The value from the previous stage, from its arrival until F ends. The previous stage holds it while it computes
    and sends it."""
    kept_input: float = 0.0
    """The part of `input` that stays as a part of `activation`."""
    input_gradient: float = 0.0
    """The gradient of `input`, which goes to the previous stage and is held there until its B or I ends."""
    recomputed: float = 0.0
    """What a program of its own recomputes for B or I (rematerialisation), while that runs."""
    recomputed_inside: float = 0.0
    """What B or I recomputes within its own program, at most at once, while it runs."""
    found_for_weights: float = 0.0
    """The part of `made_for_weights` that other fields count while I runs: output gradients, and what is recomputed."""
    new_state: float = 0.0
    """State that F changes, while it runs: until it ends, the old state exists too."""

    def __post_init__(self) -> None:
        for what, count in vars(self).items():
            if not 0 <= count < math.inf:
                raise ValueError(f"A number of bytes must be 0 or more, and finite. Got {count} for {what}.")


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

    @classmethod
    def of(cls, plan: Plan, costs: Costs, memory: Sequence[StageMemory] = ()) -> "Timeline":
        """The timeline of a plan that is known to be valid."""
        assert len(memory) in (0, plan.num_stages), "the memory of every stage, or of none"
        starts = plan.start_times(costs.time_of, costs.transfer)
        ends = {action: start + costs.time_of(action) for action, start in starts.items()}
        return cls(plan, starts, ends, memory, costs.transfer)

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
        from the end of its action until it has arrived. What a program needs inside itself is not counted.
        """
        assert self.memory, "simulate the plan with the memory of its stages"
        held = sum(self.memory[stage].always for stage in self.plan.stages_of(rank))
        changes = sorted((*self._own_changes(rank), *self._arrivals(rank)), key=lambda change: change[:2])
        totals = accumulate((change for *_, change in changes), initial=held)
        return list(zip((0.0, *(time for time, *_ in changes)), totals, strict=True))

    def _own_changes(self, rank: int) -> Iterator[tuple[float, int, float]]:
        """Time, place among what happens at once, and bytes of what the rank's own actions take and give back."""
        for action in self.plan.orders[rank]:
            start, end = self.starts[action], self.ends[action]
            taken, given_back = self._bytes_of(action)
            sent, receiver = self._sent(action)
            stays = receiver == rank or self.transfer > 0
            yield start, _TAKEN, taken + sent
            yield end, _GIVEN_BACK if end > start else _AT_LAST, -(given_back + (0 if stays else sent))
            if sent and stays and receiver != rank:
                yield end + self.transfer, _GIVEN_BACK, -sent

    def _arrivals(self, rank: int) -> Iterator[tuple[float, int, float]]:
        """The same of what other ranks send.

        At equal times, what a lower rank sends is there before what ends is given back, and what a higher rank sends
        is not: so the executor hands out work.
        """
        for sender in range(self.plan.num_ranks):
            for action in self.plan.orders[sender] if sender != rank else ():
                sent, receiver = self._sent(action)
                if sent and receiver == rank:
                    yield self.ends[action], _FROM_LOWER if sender < rank else _FROM_HIGHER, sent

    def _sent(self, action: Action) -> tuple[float, int]:
        """The bytes that an action makes for another stage, and the rank of that stage."""
        stage, ranks = action.stage, self.plan.stage_ranks
        if action.op is Op.FORWARD:
            return (self.memory[stage + 1].input, ranks[stage + 1]) if stage + 1 < len(ranks) else (0.0, ranks[stage])
        if action.op is Op.BACKWARD_WEIGHT or stage == 0:
            return 0.0, ranks[stage]
        return self.memory[stage].input_gradient, ranks[stage - 1]

    def _bytes_of(self, action: Action) -> tuple[float, float]:
        """What an action takes when it starts, beside what it sends, and what it gives back of all it has."""
        stage = self.memory[action.stage]
        taken, given_back = bytes_of(stage, action, self.plan.forward_only)
        if action.op is Op.FORWARD:
            kept = 0.0 if self.plan.forward_only else stage.kept_input
            return taken - kept + stage.new_state, given_back + stage.input - kept + stage.new_state
        if action.op is Op.BACKWARD_WEIGHT:
            return taken, given_back
        gradient = self.memory[action.stage + 1].input_gradient if action.stage + 1 < self.plan.num_stages else 0.0
        found = stage.found_for_weights if action.op is Op.BACKWARD_INPUT else 0.0
        recomputed = stage.recomputed + stage.recomputed_inside
        return taken + recomputed - found, given_back + recomputed + gradient - found

    @cached_property
    def peak_bytes(self) -> tuple[float, ...]:
        """The most bytes that a device of the rank holds at once."""
        return tuple(max(held for _, held in self.memory_curve(rank)) for rank in range(self.plan.num_ranks))


_FROM_LOWER, _GIVEN_BACK, _FROM_HIGHER, _TAKEN, _AT_LAST = range(5)
"""The order of changes of memory at one time."""


def bytes_of(memory: StageMemory, action: Action, forward_only: bool = False) -> tuple[float, float]:
    """What an action takes for other actions when it starts, and what it gives back of that when it ends.

    What it needs only while it runs, and boundary values in transit, are not included.
    """
    match action.op:
        case Op.FORWARD:
            return (0.0 if forward_only else memory.activation), 0.0
        case Op.BACKWARD:
            return 0.0, memory.activation
        case Op.BACKWARD_INPUT:
            return memory.made_for_weights, memory.activation - memory.kept_for_weights
        case Op.BACKWARD_WEIGHT:
            return 0.0, memory.kept_for_weights + memory.made_for_weights


def simulate(plan: Plan, costs: Costs | None = None, memory: Sequence[StageMemory] = ()) -> Timeline:
    """The timeline of a plan whose ranks start each action of their order as early as they can.

    Arguments:
        plan: The plan; it is checked.
        costs: The times of actions and transfers.
        memory: What each stage holds, in stage order; empty predicts no memory.

    Raises `PlanError` when the plan is not valid.
    """
    validate(plan)
    return Timeline.of(plan, costs or Costs(), memory)
