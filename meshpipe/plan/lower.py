"""Lowers a plan: when buffers move and when they are freed, in one order for all processes."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

from meshpipe.plan.graph import Value
from meshpipe.plan.plan import Action, Op, Plan

Kind: TypeAlias = Literal["x", "y", "o", "r", "dy", "dx", "w"]
"""What a buffer holds. `x`: a value that stages of a rank read, under the first of them (batches are not buffers).
`y`: an output that is to move to another rank. `o`: the output of the last stage, where it is asked for; it stays.
`r`: what forward stores for backward. `dy`: the gradient of a stage's output that one of its readers has computed.
`dx`: the gradient of an input, which is to move. `w`: what the input part of a split backward stores for the weight
part."""


@dataclass(frozen=True, slots=True, order=True)
class Buffer:
    """The name of arrays of one microbatch at a stage; prints as `x2.0` for stage 2 and microbatch 0."""

    kind: Kind
    stage: int
    microbatch: int
    name: str = ""
    """The name of the value in the graph, if it has one."""
    reader: int | None = None
    """Of a `dy` of a value with a name: the stage that has computed it."""

    def __str__(self) -> str:
        name = f":{self.name}" if self.name else ""
        reader = "" if self.reader is None else f"/{self.reader}"
        return f"{self.kind}{self.stage}.{self.microbatch}{name}{reader}"


@dataclass(frozen=True, slots=True)
class Compute:
    """Run an action on its rank. Batch, parameters, loss and gradients, which it uses too, are not buffers."""

    rank: int
    action: Action
    reads: tuple[Buffer, ...]
    writes: tuple[Buffer, ...]

    def __str__(self) -> str:
        return f"{self.action}: {_join(self.reads)} -> {_join(self.writes)}".replace(":  ->", ": ->").rstrip()


@dataclass(frozen=True, slots=True)
class Transfer:
    """Copy a buffer to another rank."""

    source: Buffer
    target: Buffer
    source_rank: int
    target_rank: int

    def __str__(self) -> str:
        return f"move {self.source} -> {self.target}"


@dataclass(frozen=True, slots=True)
class Free:
    """Free buffers of one rank: the instruction before was their last use."""

    rank: int
    buffers: tuple[Buffer, ...]

    def __str__(self) -> str:
        return f"free {_join(self.buffers)}"


@dataclass(frozen=True, slots=True)
class Reduce:
    """All-reduce the gradients of a stage, and the sums that it makes such as the loss, over the data axis of its
    rank. A stage that has neither does nothing here.
    """

    rank: int
    stage: int

    def __str__(self) -> str:
        return f"reduce {self.stage}"


Instruction: TypeAlias = Compute | Transfer | Free | Reduce


@dataclass(frozen=True)
class LoweredPlan:
    """A plan's instructions in one global order, which is the same in every process.

    A process runs the instructions of its own ranks in this order. Both sides of every transfer then have the same
    order of transfers, so no two processes can wait for each other.
    """

    plan: Plan
    instructions: tuple[Instruction, ...]

    def of_rank(self, rank: int) -> tuple[Instruction, ...]:
        """The instructions that concern the rank; a transfer concerns both of its ranks."""
        return self._of_ranks[rank]

    @cached_property
    def _of_ranks(self) -> tuple[tuple[Instruction, ...], ...]:
        rows: list[list[Instruction]] = [[] for _ in range(self.plan.num_ranks)]
        for instruction in self.instructions:
            for rank in _ranks(instruction):
                rows[rank].append(instruction)
        return tuple(map(tuple, rows))

    def to_text(self) -> str:
        return "".join(f"{instruction}\n" for instruction in self.instructions)


def lower(
    plan: Plan, *, reduces: bool = False, outputs: bool = False, late: Collection[str] = frozenset()
) -> LoweredPlan:
    """A valid plan with its moves and frees, made in time about linear in the number of its actions.

    Arguments:
        plan: A valid plan; it is not checked again.
        reduces: Whether ranks split microbatches over a data axis, so that every stage all-reduces its gradients once,
            after its last action.
        outputs: Whether the outputs of the last stage are kept, in place of a loss.
        late: Names of values that wait on the rank of their source and move right before a rank first reads them.
            All others move as soon as they are made.
    """
    names = {(stage, op): name_buffers(plan, stage, op, outputs) for stage in range(plan.num_stages) for op in Op}
    computes = []
    for action in order_actions(plan):
        reads, writes = names[action.stage, action.op]
        computes.append(
            Compute(
                plan.stage_ranks[action.stage],
                action,
                tuple([spot.at(action.microbatch) for spot in reads]),
                tuple([spot.at(action.microbatch) for spot in writes]),
            )
        )
    instructions = add_frees(add_transfers(plan, computes, late))
    return LoweredPlan(plan, tuple(add_reductions(instructions) if reduces else instructions))


def order_actions(plan: Plan) -> list[Action]:
    """All actions in the order of their times with unit durations, then of their ranks.

    Every action follows what it depends on, and no rank's work is issued far ahead of the others'.
    """
    starts = plan.start_times()
    return sorted(starts, key=lambda action: (starts[action], plan.stage_ranks[action.stage]))


class Spot(NamedTuple):
    """A buffer of any microbatch."""

    kind: Kind
    stage: int
    name: str = ""
    reader: int | None = None

    def at(self, microbatch: int) -> Buffer:
        return Buffer(self.kind, self.stage, microbatch, self.name, self.reader)


def name_buffers(plan: Plan, stage: int, op: Op, outputs: bool = False) -> tuple[list[Spot], list[Spot]]:
    """What an action of the stage reads and writes: values and gradients in the order of the graph. Gradients of one
    value stand in the order of the stages that have computed them.
    """
    graph = plan.graph
    residuals = [Spot("r", stage)] if plan.has_backward(stage) else []
    if op is Op.FORWARD:
        kept = [Spot("o", stage)] if outputs and stage == plan.num_stages - 1 else []
        made = [_written(plan, value) for value in graph.outputs(stage)]
        return [_read(plan, value, stage) for value in graph.inputs(stage)], [*residuals, *made, *kept]
    if op is Op.BACKWARD_WEIGHT:
        return [Spot("w", stage)], []
    of_outputs = [
        _gradient(value, reader)
        for value in graph.outputs(stage)
        if graph.has_gradient(value)
        for reader in value.targets
    ]
    of_inputs = [
        _gradient(value, stage)
        if plan.stage_ranks[value.source] == plan.stage_ranks[stage]
        else Spot("dx", stage, value.name)
        for value in graph.inputs(stage)
        if graph.has_gradient(value)
    ]
    for_weights = [Spot("w", stage)] if op is Op.BACKWARD_INPUT else []
    return [*residuals, *of_outputs], [*of_inputs, *for_weights]


def _written(plan: Plan, value: Value) -> Spot:
    """Where a value is made: where it is read, if it stays on its rank."""
    home = plan.stage_ranks[value.source]
    stays = all(plan.stage_ranks[target] == home for target in value.targets)
    return Spot("x", value.targets[0], value.name) if stays else Spot("y", value.source, value.name)


def _read(plan: Plan, value: Value, stage: int) -> Spot:
    """Where a stage reads a value: where it was made, or where it has arrived on the rank of the stage."""
    rank = plan.stage_ranks[stage]
    if rank == plan.stage_ranks[value.source]:
        return _written(plan, value)
    return Spot("x", next(s for s in value.targets if plan.stage_ranks[s] == rank), value.name)


def _gradient(value: Value, reader: int) -> Spot:
    """Where the source of a value reads the gradient that another stage has computed."""
    return Spot("dy", value.source, value.name, reader if value.name else None)


def add_transfers(
    plan: Plan, computes: Iterable[Compute], late: Collection[str] = frozenset()
) -> Iterator[Compute | Transfer]:
    """Adds the transfers. As soon as computed, `y` moves once to each other rank that reads it, and `dx` to the source
    of its value. A value that is late moves to a rank right before that first reads it.
    """
    ranks = plan.stage_ranks
    sources = {(stage, v.name): v.source for stage in range(plan.num_stages) for v in plan.graph.inputs(stage)}
    arrivals = {
        (v.source, v.name): list(dict.fromkeys(_read(plan, v, s) for s in v.targets if ranks[s] != ranks[v.source]))
        for v in plan.graph.values
    }
    waiting: dict[Buffer, Transfer] = {}
    for compute in computes:
        for buffer in compute.reads:
            if buffer.name in late and buffer in waiting:
                yield waiting.pop(buffer)
        yield compute
        for source in compute.writes:
            if source.kind == "y":
                for spot in arrivals[source.stage, source.name]:
                    target = spot.at(source.microbatch)
                    transfer = Transfer(source, target, compute.rank, ranks[target.stage])
                    if source.name in late:
                        waiting[target] = transfer
                    else:
                        yield transfer
            elif source.kind == "dx":
                stage, name = source.stage, source.name
                spot = Spot("dy", sources[stage, name], name, stage if name else None)
                yield Transfer(source, spot.at(source.microbatch), compute.rank, ranks[spot.stage])


def add_frees(instructions: Iterable[Compute | Transfer]) -> Iterator[Instruction]:
    """Frees every buffer directly after the last instruction that reads it."""
    instructions = list(instructions)
    last_use = {buffer: index for index, instruction in enumerate(instructions) for buffer in _reads(instruction)}
    for index, instruction in enumerate(instructions):
        yield instruction
        dead = tuple(buffer for buffer in _reads(instruction) if last_use[buffer] == index)
        if dead:
            yield Free(_ranks(instruction)[0], dead)


def add_reductions(instructions: Iterable[Instruction]) -> Iterator[Instruction]:
    """Adds the reduction of every stage after its last action, while other stages are still at work.

    What the last action sends to another rank goes first, since that rank may wait for it.
    """
    instructions = list(instructions)
    last = {i.action.stage: index for index, i in enumerate(instructions) if isinstance(i, Compute)}
    due: list[Reduce] = []
    for index, instruction in enumerate(instructions):
        if isinstance(instruction, Compute):
            yield from due
            is_last = last[instruction.action.stage] == index
            due = [Reduce(instruction.rank, instruction.action.stage)] if is_last else []
        yield instruction
    yield from due


def _reads(instruction: Compute | Transfer) -> tuple[Buffer, ...]:
    return (instruction.source,) if isinstance(instruction, Transfer) else instruction.reads


def _ranks(instruction: Instruction) -> tuple[int, ...]:
    if isinstance(instruction, Transfer):
        return (instruction.source_rank, instruction.target_rank)
    return (instruction.rank,)


def _join(buffers: tuple[Buffer, ...]) -> str:
    return " ".join(map(str, buffers))
