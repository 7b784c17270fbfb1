"""Estimates the step of a layout: its time, what the time is spent on, its memory, and what moves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from meshpipe.advise.layout import Layout
from meshpipe.advise.stage_needs import StageNeeds, held_by_rank, needs_of
from meshpipe.advise.times import SPLIT, LayerTimes, Seconds
from meshpipe.advise.work import ModelWork
from meshpipe.choose.step_time import least_step, step_time
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.links import ROUNDS, Group, collective_seconds, move_seconds
from meshpipe.plan.partition import partition, partition_by_cost
from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.simulate import Costs

USABLE = 0.92
"""The share of a device's memory that arrays and programs can have; the rest is the runtime's, and lost in gaps."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One layout on the machine. Bytes are those of a device."""

    layout: Layout
    cuts: tuple[range, ...]
    """The layers of every stage."""
    seconds: float
    """Of a step."""
    parts: Mapping[str, float]
    """What the slowest rank spends these seconds on: `compute`, `recompute`, `tensor` (its collectives), `bubble`,
    `reduce` (gradients over the data axis), `gather` (parameters that are fully sharded), `update` and `host`."""
    bubble: float
    """The idle share of the plan, over all ranks."""
    memory: float
    """The most that a device holds."""
    memory_parts: Mapping[str, float] = field(default_factory=dict)
    """Of the fullest device."""
    moved: float = 0.0
    """What a device sends to others in a step."""


@dataclass(frozen=True)
class _Staged:
    """The stages of a layout, and their times."""

    cuts: tuple[range, ...]
    ranks: tuple[int, ...]
    """Of every stage."""
    times: tuple[Mapping[Op, Seconds], ...]
    needs: tuple[StageNeeds, ...]


class Estimator:
    """Estimates layouts of one model on one machine. A step may need `memory` bytes of a device, or else most of it."""

    def __init__(
        self, work: ModelWork, times: LayerTimes, hardware: Hardware, batch_size: int, memory: float | None = None
    ) -> None:
        self.work, self.times, self.hardware = work, times, hardware
        self.batch_size = batch_size
        self.limit = USABLE * hardware.memory_bytes if memory is None else memory
        """The bytes of a device that a step may need."""
        self._layers: dict[object, tuple[Seconds, ...]] = {}
        self._reasons: dict[tuple[int, int, bool], str | None] = {}
        self._stages: dict[object, _Staged] = {}
        self._cut_of: dict[tuple[int, ...], tuple[range, ...]] = {}
        one = Layout()
        self._weights = [
            sum(self.times.seconds(place, op, 1.0, one).total for op in (Op.FORWARD, Op.BACKWARD))
            for place in range(len(work.layers))
        ]

    def why_not(self, layout: Layout) -> str | None:
        """Why the layout cannot be; None if it can."""
        key = layout.data, layout.tensor, layout.is_sharded
        if key not in self._reasons:
            self._reasons[key] = self.work.why_not_split(layout.data, layout.tensor, is_sharded=layout.is_sharded)
        return self._reasons[key]

    def examples(self, layout: Layout) -> float:
        """Of a microbatch, on each part of the data axis."""
        return self.batch_size / layout.num_microbatches / layout.data

    def least_seconds(self, layout: Layout) -> float:
        """A step takes at least as long, whatever its plan: the slowest rank waits for its first input and then works.

        Backwards in one piece have to come back through the ranks before it as well.
        """
        staged = self._staged(layout)
        splits = layout.schedule in SPLIT
        forward = [times[Op.FORWARD].total for times in staged.times]
        backward = [times[Op.BACKWARD].total for times in staged.times]
        whole = [f + b for f, b in zip(forward, self._backwards(staged, splits=splits), strict=True)]
        transfer = self._slowest_transfer(layout, staged)
        owns = [0.0] * layout.pipeline
        for rank, seconds in zip(staged.ranks, whole, strict=True):
            owns[rank] += layout.num_microbatches * seconds
        least = 0.0
        for rank, own in enumerate(owns):
            first = staged.ranks.index(rank)
            waits = sum(forward[:first]) + transfer * first
            if not splits:
                waits += sum(backward[:first]) + transfer * first
            least = max(least, waits + own)
        around = [self._once(layout, staged, rank).total for rank in range(layout.pipeline)]
        actions = [2 * layout.num_microbatches * layout.stages_per_rank] * layout.pipeline
        return least_step(least, owns, actions, around, self.hardware, layout.data * layout.tensor)

    def least_memory(self, layout: Layout) -> float:
        """What the fullest device needs at least: its stages, and one microbatch."""
        staged = self._staged(layout)
        totals = [0.0] * layout.pipeline
        needs = staged.needs
        for stage, rank in enumerate(staged.ranks):
            totals[rank] += needs[stage].always
        return max(totals[rank] + needs[stage].least - needs[stage].always for stage, rank in enumerate(staged.ranks))

    def memory(self, layout: Layout) -> tuple[float, Mapping[str, float]]:
        """What the fullest device holds, and its parts."""
        staged, plan = self._staged(layout), plan_of(layout)
        needs = staged.needs
        held = [held_by_rank(plan, rank, needs) for rank in range(layout.pipeline)]
        rank = max(range(layout.pipeline), key=lambda rank: held[rank].total)
        own = [needs[stage] for stage in plan.stages_of(rank)]
        parts = {
            "parameters": sum(need.parameters for need in own),
            "gradients": sum(need.gradients for need in own),
            "optimizer": sum(need.optimizer for need in own),
            "batch": sum(need.batch for need in own),
            "activations": held[rank].activations - max(need.inside for need in own),
            "temporaries": max(need.inside for need in own),
        }
        return held[rank].total, parts

    def estimate(self, layout: Layout) -> Estimate:
        """The step of a layout, by simulation of its plan."""
        staged, plan = self._staged(layout), plan_of(layout)
        costs = Costs(
            {(s, op): seconds.total for s, times in enumerate(staged.times) for op, seconds in times.items()},
            self._slowest_transfer(layout, staged),
        )
        onces = [self._once(layout, staged, rank) for rank in range(layout.pipeline)]
        each = layout.data * layout.tensor
        time = step_time(plan, costs, [once.total for once in onces], self.hardware, each)
        timeline = time.timeline
        rank = max(range(layout.pipeline), key=lambda rank: timeline.busy[rank])
        spent = Seconds()
        for action in plan.orders[rank]:
            spent += staged.times[action.stage][action.op]
        # Of devices that share cores, the same work takes less time while others idle.
        spent *= timeline.busy[rank] / spent.total if spent.total else 1.0
        once = max(onces, key=lambda once: once.total)
        share = time.around / once.total if once.total else 1.0
        parts = {
            "compute": spent.compute,
            "recompute": spent.recompute,
            "tensor": spent.tensor,
            "bubble": timeline.makespan - timeline.busy[rank],
            "host": time.host,
            "reduce": share * once.reduce,
            "gather": share * once.gather,
            "update": share * once.update,
        }
        memory, memory_parts = self.memory(layout)
        return Estimate(
            layout=replace(layout, partition=_partition_of(staged.cuts)),
            cuts=staged.cuts,
            seconds=sum(parts.values()),
            parts=parts,
            bubble=timeline.bubble_fraction,
            memory=memory,
            memory_parts=memory_parts,
            moved=self._moved(layout, staged, plan, rank),
        )

    def _backwards(self, staged: _Staged, *, splits: bool) -> list[float]:
        if not splits:
            return [times[Op.BACKWARD].total for times in staged.times]
        return [
            min(times[Op.BACKWARD].total, times[Op.BACKWARD_INPUT].total + times[Op.BACKWARD_WEIGHT].total)
            for times in staged.times
        ]

    def _staged(self, layout: Layout) -> _Staged:
        """The stages; layouts share them that differ in the schedule alone, if both or neither split backwards."""
        ranks = stage_ranks(layout.schedule, layout.pipeline, layout.stages_per_rank)
        key = ranks, layout.schedule in SPLIT, replace(layout, schedule="")
        if key not in self._stages:
            self._stages[key] = self._stage(layout, ranks)
        return self._stages[key]

    def _stage(self, layout: Layout, ranks: tuple[int, ...]) -> _Staged:
        cuts, examples = self._cuts(ranks), self.examples(layout)
        layers = {op: self._layer_seconds(layout, op) for op in Op}
        times = tuple({op: self._together(layers[op][cut.start : cut.stop]) for op in Op} for cut in cuts)
        return _Staged(cuts, ranks, times, tuple(needs_of(self.work, cut, layout, examples) for cut in cuts))

    def _together(self, layers: Sequence[Seconds]) -> Seconds:
        """The time of a program of these layers."""
        total = sum(layers, Seconds())
        return total + Seconds(self.times.per_call) if total.total else total

    def _cuts(self, ranks: tuple[int, ...]) -> tuple[range, ...]:
        """The cut whose slowest stage takes the least time; an even one where ranks are no slower with it."""
        if ranks not in self._cut_of:
            even = partition(len(self._weights), len(ranks))
            # Equal stages are nearly the best cut, and many times faster found than equal ranks.
            best = partition_by_cost(self._weights, range(len(ranks)))
            is_even = self._slowest(even, ranks) <= 1.005 * self._slowest(best, ranks)
            self._cut_of[ranks] = even if is_even else best
        return self._cut_of[ranks]

    def _slowest(self, cuts: Sequence[range], ranks: Sequence[int]) -> float:
        totals = [0.0] * (max(ranks) + 1)
        for cut, rank in zip(cuts, ranks, strict=True):
            totals[rank] += sum(self._weights[place] for place in cut)
        return max(totals)

    def _layer_seconds(self, layout: Layout, op: Op) -> tuple[Seconds, ...]:
        examples = self.examples(layout)
        key = op, examples, layout.data, layout.tensor, layout.remat
        if key not in self._layers:
            places = range(len(self.work.layers))
            self._layers[key] = tuple(self.times.seconds(place, op, examples, layout) for place in places)
        return self._layers[key]

    def _slowest_transfer(self, layout: Layout, staged: _Staged) -> float:
        if layout.pipeline == 1:
            return 0.0
        largest = max(self.work.layers[cut[-1]].output for cut in staged.cuts[:-1])
        return move_seconds(largest * self.examples(layout), layout.data * layout.tensor, self.hardware)

    def _once(self, layout: Layout, staged: _Staged, rank: int) -> "_Once":
        """What a rank does once per step besides its actions."""
        parameters = gradients = optimizer = whole = 0.0
        count = 0
        parts = layout.data if layout.is_sharded else 1
        for stage, cut in enumerate(staged.cuts):
            if staged.ranks[stage] != rank:
                continue
            for layer in (self.work.layers[place] for place in cut):
                for parameter in layer.parameters:
                    if not parameter.is_trained:
                        continue
                    kept, on_device = parameter.on_device(parts, layout.tensor), parameter.on_device(1, layout.tensor)
                    parameters, whole = parameters + kept, whole + on_device
                    gradients += layer.gradient_bytes * on_device
                    optimizer += layer.optimizer_bytes * kept
                    count += 1
        # XLA combines the collectives of parameters on accelerators alone.
        count = count if self.hardware.platform == "cpu" else 1
        group = Group(layout.data, layout.tensor)
        kind = "reduce-scatter" if layout.is_sharded else "all-reduce"
        zeros = gradients / (self.hardware.memory_bandwidth * self.hardware.efficiency["memory"])
        return _Once(
            reduce=collective_seconds(kind, gradients, group, self.hardware, count),
            gather=collective_seconds("all-gather", whole, group, self.hardware, count) if layout.is_sharded else 0.0,
            update=zeros + self.times.update(parameters, gradients / parts, optimizer),
            sent=(layout.data - 1) / layout.data * (ROUNDS[kind] * gradients + (whole if layout.is_sharded else 0.0)),
        )

    def _moved(self, layout: Layout, staged: _Staged, plan: Plan, rank: int) -> float:
        examples, tensor = self.examples(layout), layout.tensor
        sent = self._once(layout, staged, rank).sent
        for stage in plan.stages_of(rank):
            layers = [self.work.layers[place] for place in staged.cuts[stage]]
            reduced = sum(layer.reduces_forward + layer.reduces_backward for layer in layers)
            again = sum(layer.reduces_forward for layer in layers) if layout.remat in ("layer", "full") else 0.0
            reduced = (reduced + again) * 2 * (tensor - 1) / tensor
            ends = [staged.cuts[stage][-1]] * (stage + 1 < len(staged.cuts)) + [staged.cuts[stage].start - 1] * (
                stage > 0
            )
            handed = sum(self.work.layers[place].output for place in ends) if layout.pipeline > 1 else 0.0
            sent += layout.num_microbatches * examples * (reduced + handed)
        return sent


@dataclass(frozen=True, kw_only=True)
class _Once:
    reduce: float
    gather: float
    update: float
    sent: float
    """Bytes, by the first two."""

    @property
    def total(self) -> float:
        return self.reduce + self.gather + self.update


def _partition_of(cuts: Sequence[range]) -> str:
    """How `--partition` names a cut."""
    lengths = [len(cut) for cut in cuts]
    is_even = lengths[0] - lengths[-1] <= 1 and lengths == sorted(lengths, reverse=True)
    return "even" if is_even else ",".join(str(cut.start) for cut in cuts)


@lru_cache(maxsize=4096)
def _plan(schedule: str, ranks: int, microbatches: int, stages: int) -> Plan:
    return make_plan(schedule, ranks, microbatches, stages)


def plan_of(layout: Layout) -> Plan:
    return _plan(layout.schedule, layout.pipeline, layout.num_microbatches, layout.stages_per_rank)


@lru_cache(maxsize=4096)
def stage_ranks(schedule: str, ranks: int, stages: int) -> tuple[int, ...]:
    """The rank of every stage, which does not depend on the number of microbatches."""
    return _plan(schedule, ranks, ranks, stages).stage_ranks
