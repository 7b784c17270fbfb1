"""Runs a lowered plan: resolves it once to a flat list of calls, which every step walks with buffers of its own."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import fields

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.pipeline.transfer import transfer_between
from meshpipe.plan.lower import Buffer, Compute, Free, Instruction, LoweredPlan, Reduce, Transfer
from meshpipe.plan.plan import Op, Plan
from meshpipe.sharding import Arrays, place, replicated
from meshpipe.stage.calls import Call, Slots, StageCalls, StageSlots
from meshpipe.stage.programs import StagePrograms
from meshpipe.stage.spec import Boundary
from meshpipe.stage.traced import TracedStage

Observer = Callable[[Compute | Transfer, Arrays, Arrays], None]
"""Called after each local action or transfer is dispatched, with the arrays that it produced and the accumulators that
it updated. The next action of the stage donates the accumulators, so copy them before waiting."""


Sums = dict[int, dict[str, jax.Array]]
"""What stages add up over the microbatches of a step, by stage and name: in the last stage the sum of the losses
(`loss`), their weight (`weight`), and in evaluation the sums of metrics."""


class Executor:
    """A lowered plan with its buffers resolved to slots of a list, so that a step is a walk over a flat list of calls.

    `traced` and `programs` hold the stages that live here; instructions of other stages are left out, so the work per
    step is that of the local ranks. `meshes` has the submesh of every stage. `StageCalls` says what the slots hold.
    `name` keeps the transfers of this executor apart from those of other executors and trainers.
    """

    def __init__(
        self,
        name: str,
        lowered: LoweredPlan,
        meshes: Sequence[Mesh],
        traced: Mapping[int, TracedStage],
        programs: Mapping[int, StagePrograms],
    ):
        self._name = name
        self._plan = lowered.plan
        self._meshes = meshes
        self._moves: dict[Hashable, Callable[[Arrays | None], Arrays | None]] = {}
        self._traced = traced
        self._programs = programs
        self._slots: Slots = []
        self._named: dict[Buffer, int] = {}
        self._free: list[int] = []
        self._microbatch_indices = {
            s: tuple(
                place(
                    [np.uint32(m) for m in range(lowered.plan.num_microbatches)],
                    [replicated(stage.spec.mesh)] * lowered.plan.num_microbatches,
                )
            )
            for s, stage in traced.items()
        }
        names = [field.name for field in fields(StageSlots)]
        self._calls = {
            s: StageCalls(stage, programs[s], StageSlots(**{name: self._new_slot() for name in names}))
            for s, stage in traced.items()
        }
        self._summing = [s for s, stage in traced.items() if stage.sum_names]
        local = [instruction for instruction in lowered.instructions if self._is_local(instruction)]
        reduced = {instruction.stage for instruction in local if isinstance(instruction, Reduce)}
        if reduced != {s for s, calls in self._calls.items() if calls.reduces}:
            raise ValueError(
                "A lowered plan must reduce the accumulators that its stages leave unreduced over the data axis. "
                "Got one without these reductions. "
                "Pass reduces=True to lower."
            )
        self._fused_backwards = {
            (i.action.stage, i.action.microbatch): i
            for i in local
            if isinstance(i, Compute) and i.action.op is Op.BACKWARD and self._calls[i.action.stage].is_fused
        }
        """Backwards that run inside the program of their forward, which they directly follow."""
        self._steps: list[Call] = []
        self._observable: list[tuple[Compute | Transfer, Callable[[Slots], tuple[Arrays, Arrays]]] | None] = []
        for instruction in local:
            self._steps.append(self._resolve(instruction))
            self._observable.append(
                None if isinstance(instruction, Free | Reduce) else (instruction, self._observed_by(instruction))
            )
        outputs = sorted(buffer for buffer in self._named if buffer.kind == "o")
        self._outputs = [self._named[buffer] for buffer in outputs]
        self._empty: Slots = [None] * len(self._slots)

    def run(
        self,
        params: Mapping[int, Arrays],
        state: Mapping[int, Arrays],
        inputs: Mapping[int, Arrays],
        observe: Observer | None = None,
    ) -> tuple[dict[int, Arrays], dict[int, Arrays], Sums]:
        """Runs one batch. Returns gradients and new state of every local stage, and the sums of those that have some.

        Everything is dispatched asynchronously. Gradients are those of the sum of the losses: divide by the weight.
        """
        slots = self._run(params, state, inputs, observe)
        return (
            {s: slots[calls.slots.accumulators] for s, calls in self._calls.items()},
            {s: calls.state_after(slots, state[s]) for s, calls in self._calls.items()},
            {s: self._calls[s].sums(slots) for s in self._summing},
        )

    def outputs(
        self, params: Mapping[int, Arrays], state: Mapping[int, Arrays], inputs: Mapping[int, Arrays]
    ) -> list[Arrays]:
        """What the last stage puts out for each microbatch, where the plan keeps it; none where it lives elsewhere.

        Everything is dispatched asynchronously.
        """
        slots = self._run(params, state, inputs, None)
        return [slots[index] for index in self._outputs]

    def hoist(self, params: Mapping[int, Arrays], state: Mapping[int, Arrays]) -> dict[int, Arrays]:
        """What every local stage computes once per step from parameters and fixed state, for `advance`."""
        return {s: calls.hoisted(params[s], state[s]) for s, calls in self._calls.items()}

    def advance(
        self,
        params: Mapping[int, Arrays],
        state: Mapping[int, Arrays],
        inputs: Mapping[int, Arrays],
        hoisted: Mapping[int, Arrays],
    ) -> tuple[list[Arrays], dict[int, Arrays]]:
        """What `outputs` returns, and the state afterwards, with what `hoist` has computed for the same parameters.

        Where stages overwrite their state, that of before is donated.
        """
        slots = self._run(params, state, inputs, None, hoisted)
        after = {s: calls.state_after(slots, state[s]) for s, calls in self._calls.items()}
        return [slots[index] for index in self._outputs], after

    def _run(
        self,
        params: Mapping[int, Arrays],
        state: Mapping[int, Arrays],
        inputs: Mapping[int, Arrays],
        observe: Observer | None,
        hoisted: Mapping[int, Arrays] | None = None,
    ) -> Slots:
        """The slots at the end of a step."""
        slots = self._empty.copy()
        for s, calls in self._calls.items():
            calls.begin(slots, params[s], state[s], inputs[s], None if hoisted is None else hoisted[s])
        if observe is None:
            for step in self._steps:
                step(slots)
        else:
            for step, observable in zip(self._steps, self._observable, strict=True):
                step(slots)
                if observable is not None:
                    instruction, made = observable
                    observe(instruction, *made(slots))
        return slots

    @property
    def plan(self) -> Plan:
        return self._plan

    def accumulators(self) -> list[Arrays]:
        """Fresh zeros of all that the actions of a step add to, by stage: gradients, then loss and weight."""
        return [arrays for programs in self._programs.values() for arrays in programs.zeros()]

    def _is_local(self, instruction: Instruction) -> bool:
        if isinstance(instruction, Compute):
            return instruction.action.stage in self._traced
        if isinstance(instruction, Reduce):
            return instruction.stage in self._traced and self._calls[instruction.stage].reduces
        if isinstance(instruction, Transfer):
            return instruction.source.stage in self._traced or instruction.target.stage in self._traced
        return any(buffer.stage in self._traced for buffer in instruction.buffers)

    def _resolve(self, instruction: Instruction) -> Call:
        if isinstance(instruction, Free):
            return self._freed([self._named.pop(buffer) for buffer in instruction.buffers])
        if isinstance(instruction, Transfer):
            return self._transfer(instruction)
        if isinstance(instruction, Reduce):
            return self._calls[instruction.stage].reduce()
        if (backward := self._fused_backward(instruction)) is not None:
            return _nothing if instruction is backward else self._forward_backward(instruction, backward)
        return self._compute(instruction)

    def _observed_by(self, instruction: Compute | Transfer) -> Callable[[Slots], tuple[Arrays, Arrays]]:
        """The arrays that an observer is given for an instruction that was just resolved."""
        if isinstance(instruction, Transfer):
            if instruction.target.stage not in self._traced:
                return lambda slots: ((), ())
            target = self._slot(instruction.target)
            return lambda slots: (slots[target], ())
        if (backward := self._fused_backward(instruction)) is not None:
            if instruction is backward:
                return lambda slots: ((), ())
            (loss,) = map(self._slot, instruction.writes)
            return lambda slots: (slots[loss], ())
        written = [(self._slot(buffer), buffer.kind in ("r", "w")) for buffer in instruction.writes]
        at = self._calls[instruction.action.stage].slots
        added = at.totals if instruction.action.op is Op.FORWARD else at.accumulators

        def made(slots: Slots) -> tuple[Arrays, Arrays]:
            # What is kept for backward stands in pairs: arrays that were there before, and new ones.
            values = [slots[index][1] if is_pair else slots[index] for index, is_pair in written]
            return tuple([array for value in values for array in value]), slots[added]

        return made

    def _new_slot(self) -> int:
        if self._free:
            return self._free.pop()
        self._slots.append(None)
        return len(self._slots) - 1

    def _slot(self, buffer: Buffer) -> int:
        """The slot of a buffer, assigned at its first use."""
        if buffer not in self._named:
            self._named[buffer] = self._new_slot()
        return self._named[buffer]

    def _freed(self, indices: list[int]) -> Call:
        self._free += indices

        def free(slots: Slots) -> None:
            for index in indices:
                slots[index] = None

        return free

    def _transfer(self, instruction: Transfer) -> Call:
        move = self._move(instruction)
        sends, receives = (buffer.stage in self._traced for buffer in (instruction.source, instruction.target))
        source = self._slot(instruction.source) if sends else None
        target = self._slot(instruction.target) if receives else None

        def transfer(slots: Slots) -> None:
            moved = move(None if source is None else slots[source])
            if target is not None:
                slots[target] = moved

        def transfer_here(slots: Slots) -> None:
            slots[target] = move(slots[source])  # type: ignore[index]

        return transfer_here if sends and receives else transfer

    def _move(self, instruction: Transfer) -> Callable[[Arrays | None], Arrays | None]:
        """The function that moves the arrays of a value, or of its gradient, between two ranks; all microbatches share
        it.
        """
        source, target = instruction.source, instruction.target
        key = target.kind, source.stage, target.stage, target.name
        if key not in self._moves:
            maker, reader = (source, target) if target.kind == "x" else (target, source)
            boundary = self._boundary(maker.stage, reader.stage, target.name)
            size = next(iter(self._traced.values())).microbatch_size
            on = boundary.on if target.kind == "x" else boundary.gradients_on
            # One name for each value and pair of stages: several values, or several gradients of one, may be on the way
            # between the same processes at the same time.
            name = " ".join(map(str, (self._name, *key)))
            shapes = on(self._meshes[target.stage], size)
            self._moves[key] = transfer_between(name, self._meshes[source.stage], shapes)
        return self._moves[key]

    def _boundary(self, maker: int, reader: int, name: str) -> Boundary:
        """The shape of the value of this name that one stage makes and another reads; either of them knows it."""
        graph, is_here = self._plan.graph, reader in self._traced
        values = graph.inputs(reader) if is_here else graph.outputs(maker)
        boundaries = self._traced[reader].boundaries_in if is_here else self._traced[maker].boundaries_out
        pairs = zip(values, boundaries, strict=True)
        return next(boundary for value, boundary in pairs if (value.source, value.name) == (maker, name))

    def _fused_backward(self, instruction: Compute) -> Compute | None:
        """The backward that is fused with this forward, or this backward itself if it is fused; else None."""
        return self._fused_backwards.get((instruction.action.stage, instruction.action.microbatch))

    def _forward_backward(self, forward: Compute, backward: Compute) -> Call:
        (loss,) = map(self._slot, forward.writes)  # no residuals are stored; observers wait for the loss in their slot
        return self._calls[forward.action.stage].forward_backward(
            self._microbatch(forward),
            x=[self._slot(buffer) for buffer in forward.reads],
            x_gradients=[self._slot(buffer) for buffer in backward.writes],
            loss=loss,
        )

    def _compute(self, instruction: Compute) -> Call:
        """Values stand in a lowered plan in the order of the graph, and so they do in a stage."""
        calls, microbatch = self._calls[instruction.action.stage], self._microbatch(instruction)
        reads, writes = (
            [(buffer.kind, self._slot(buffer)) for buffer in buffers]
            for buffers in (instruction.reads, instruction.writes)
        )
        stored = {kind: slot for kind, slot in (*reads, *writes) if kind in ("r", "w")}
        read, written = ([slot for kind, slot in found if kind not in stored] for found in (reads, writes))
        op = instruction.action.op
        if op is Op.FORWARD:
            return calls.forward(microbatch, x=read, outputs=written, residuals=stored.get("r"))
        if op is Op.BACKWARD_WEIGHT:
            return calls.backward_weight(microbatch, for_weights=stored["w"])
        if op is Op.BACKWARD:
            return calls.backward(microbatch, residuals=stored["r"], output_gradients=read, x_gradients=written)
        return calls.backward_input(
            microbatch,
            residuals=stored["r"],
            output_gradients=read,
            x_gradients=written,
            for_weights=stored["w"],
        )

    def _microbatch(self, instruction: Compute) -> jax.Array:
        return self._microbatch_indices[instruction.action.stage][instruction.action.microbatch]


def _nothing(slots: Slots) -> None:
    pass
