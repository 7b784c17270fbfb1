"""Turns a plan into a program: when buffers move and when they are freed, in one order for all processes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from meshpipe.plan.plan import Action, Op, Plan

Kind: TypeAlias = Literal["x", "y", "o", "r", "dy", "dx", "w"]
"""What a buffer holds. `x`: the input of a stage (stage 0 reads the batch instead). `y`: an output that is to move to
another rank. `o`: the output of the last stage, where it is asked for; it stays. `r`: what forward stores for backward.
`dy`: the gradient of a stage's output. `dx`: the gradient of its input, which is to move. `w`: what the input part of a
split backward stores for the weight part."""


@dataclass(frozen=True, slots=True, order=True)
class Buffer:
    """The name of a value of one microbatch at a stage; prints as `x2.0` for stage 2 and microbatch 0."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.microbatch}"


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
    """All-reduce the gradients of a stage, and in the last stage the loss, over the data axis of its rank."""

    rank: int
    stage: int

    def __str__(self) -> str:
        return f"reduce {self.stage}"


Instruction: TypeAlias = Compute | Transfer | Free | Reduce


@dataclass(frozen=True)
class Program:
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


def lower(plan: Plan, *, reduces: bool = False, outputs: bool = False) -> Program:
    """The program of a valid plan, made in time about linear in the number of its actions.

    Arguments:
        plan: A valid plan; it is not checked again.
        reduces: Whether ranks split microbatches over a data axis, so that every stage all-reduces its gradients once,
            after its last action.
        outputs: Whether the outputs of the last stage are kept, in place of a loss.
    """
    computes = [name_buffers(plan, action, outputs) for action in order_actions(plan)]
    instructions = add_frees(add_transfers(plan, computes))
    return Program(plan, tuple(add_reductions(instructions) if reduces else instructions))


def order_actions(plan: Plan) -> list[Action]:
    """All actions in the order of their times with unit durations, then of their ranks.

    Every action follows what it depends on, and no rank's work is issued far ahead of the others'.
    """
    starts = plan.start_times()
    return sorted(starts, key=lambda action: (starts[action], plan.stage_ranks[action.stage]))


def name_buffers(plan: Plan, action: Action, outputs: bool = False) -> Compute:
    """The action, with the buffers that it reads and writes. A value that stays on its rank is written where it is
    read.
    """
    stage, ranks = action.stage, plan.stage_ranks
    is_first, is_last = stage == 0, stage == plan.num_stages - 1
    reads: list[tuple[Kind, int]] = []
    writes: list[tuple[Kind, int]] = []
    if action.op is Op.FORWARD:
        if not is_first:
            reads.append(("x", stage))
        if not plan.forward_only:
            writes.append(("r", stage))
        if not is_last:
            writes.append(("x", stage + 1) if ranks[stage + 1] == ranks[stage] else ("y", stage))
        elif outputs:
            writes.append(("o", stage))
    elif action.op is Op.BACKWARD_WEIGHT:
        reads.append(("w", stage))
    else:
        reads.append(("r", stage))
        if not is_last:
            reads.append(("dy", stage))
        if not is_first:
            writes.append(("dy", stage - 1) if ranks[stage - 1] == ranks[stage] else ("dx", stage))
        if action.op is Op.BACKWARD_INPUT:
            writes.append(("w", stage))
    return Compute(ranks[stage], action, _buffers(reads, action.microbatch), _buffers(writes, action.microbatch))


def _buffers(names: list[tuple[Kind, int]], microbatch: int) -> tuple[Buffer, ...]:
    return tuple(Buffer(kind, stage, microbatch) for kind, stage in names)


def add_transfers(plan: Plan, computes: Iterable[Compute]) -> Iterator[Compute | Transfer]:
    """Adds the transfers: as soon as computed, `y` moves to the next stage's `x`, and `dx` to the previous stage's
    `dy`.
    """
    for compute in computes:
        yield compute
        for source in compute.writes:
            if source.kind == "y":
                target = Buffer("x", source.stage + 1, source.microbatch)
            elif source.kind == "dx":
                target = Buffer("dy", source.stage - 1, source.microbatch)
            else:
                continue
            yield Transfer(source, target, compute.rank, plan.stage_ranks[target.stage])


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
