"""Runs a program: the one stateful class of the engine, owner of the live buffers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from meshpipe.pipeline.transfer import transfer_between
from meshpipe.plan.lower import Buffer, Compute, Free, Instruction, Program, Reduce, Transfer
from meshpipe.plan.plan import Op, Plan
from meshpipe.sharding import Arrays, place, replicated
from meshpipe.stage.programs import StagePrograms
from meshpipe.stage.traced import TracedStage, replaced

Slots = list[Any]
Step = Callable[[Slots], None]
Observer = Callable[[Compute | Transfer, Arrays, Arrays], None]
"""Called after each local action and transfer was dispatched, with the arrays that it made, and with those that it
added to, which the next action of its stage takes over (donates)."""


class Executor:
    """A program with its buffers resolved to slots of a list, so that a step is a walk over a flat list of calls.

    `traced` and `programs` hold the stages that live here; instructions of other stages are left out, so the work per
    step is that of the local ranks. `meshes` has the submesh of every stage. Every slot holds a flat tuple of arrays.
    `name` tells transfers of this executor from those of others, of which another trainer may have some.
    """

    def __init__(
        self,
        name: str,
        program: Program,
        meshes: Sequence[Mesh],
        traced: Mapping[int, TracedStage],
        programs: Mapping[int, StagePrograms],
    ):
        self._name = name
        self._plan = program.plan
        self._meshes = meshes
        self._moves: dict[tuple[str, int], Callable[[Arrays | None], Arrays | None]] = {}
        self._traced = traced
        self._programs = programs
        self._slots: Slots = []
        self._named: dict[object, int] = {}
        self._free: list[int] = []
        self._microbatches = {
            s: tuple(
                place(
                    [np.uint32(m) for m in range(program.plan.num_microbatches)],
                    [replicated(stage.spec.mesh)] * program.plan.num_microbatches,
                )
            )
            for s, stage in traced.items()
        }
        for stage in traced:
            for name in ("params", "hoisted", "state", "inputs", "accumulators", "totals"):
                self._named[stage, name] = self._new_slot()
        local = [instruction for instruction in program.instructions if self._is_local(instruction)]
        reduced = {instruction.stage for instruction in local if isinstance(instruction, Reduce)}
        if reduced != {s for s, stage_programs in programs.items() if stage_programs.reduce is not None}:
            raise ValueError(
                "A program must reduce the accumulators that its stages leave unreduced over the data axis. "
                "Got one without these reductions. "
                "Pass reduces=True to lower."
            )
        self._backwards = {
            (i.action.stage, i.action.microbatch): i
            for i in local
            if isinstance(i, Compute)
            and i.action.op is Op.BACKWARD
            and programs[i.action.stage].forward_backward is not None
        }
        """Those that are done together with their forward, which they follow at once."""
        self._steps: list[Step] = []
        self._observable: list[tuple[Compute | Transfer, Callable[[Slots], tuple[Arrays, Arrays]]] | None] = []
        for instruction in local:
            self._steps.append(self._resolve(instruction))
            self._observable.append(
                None if isinstance(instruction, Free | Reduce) else (instruction, self._made(instruction))
            )
        self._empty: Slots = [None] * len(self._slots)

    def run(
        self,
        params: Mapping[int, Arrays],
        state: Mapping[int, Arrays],
        inputs: Mapping[int, Arrays],
        observe: Observer | None = None,
    ) -> tuple[dict[int, Arrays], dict[int, Arrays], Arrays]:
        """One batch: summed gradients and new state of every local stage, and `(loss sum, weight)` from the last.

        Everything is dispatched asynchronously. Gradients are of the sum of the losses: divide by the weight.
        """
        slots = self._empty.copy()
        for s, programs in self._programs.items():
            slots[self._named[s, "params"]] = params[s]
            stage = self._traced[s]
            slots[self._named[s, "hoisted"]] = programs.hoisted(params[s], tuple([state[s][i] for i in stage.fixed]))
            slots[self._named[s, "state"]] = tuple([state[s][i] for i in stage.changing])
            slots[self._named[s, "inputs"]] = inputs[s]
            slots[self._named[s, "accumulators"]], slots[self._named[s, "totals"]] = programs.zeros()
        if observe is None:
            for step in self._steps:
                step(slots)
        else:
            for step, observable in zip(self._steps, self._observable, strict=True):
                step(slots)
                if observable is not None:
                    instruction, made = observable
                    observe(instruction, *made(slots))
        last = next((s for s, stage in self._traced.items() if stage.spec.is_last), None)
        return (
            {s: slots[self._named[s, "accumulators"]] for s in self._traced},
            {
                s: replaced(state[s], stage.changing, slots[self._named[s, "state"]])
                for s, stage in self._traced.items()
            },
            () if last is None else slots[self._named[last, "totals"]],
        )

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
            return instruction.stage in self._traced and self._programs[instruction.stage].reduce is not None
        if isinstance(instruction, Transfer):
            return instruction.source.stage in self._traced or instruction.target.stage in self._traced
        return any(buffer.stage in self._traced for buffer in instruction.buffers)

    def _resolve(self, instruction: Instruction) -> Step:
        if isinstance(instruction, Free):
            return self._freed([self._named.pop(buffer) for buffer in instruction.buffers])
        if isinstance(instruction, Transfer):
            return self._transfer(instruction)
        if isinstance(instruction, Reduce):
            return self._reduce(instruction.stage)
        if (backward := self._backward_done_with(instruction)) is not None:
            return _nothing if instruction is backward else self._forward_backward(instruction, backward)
        resolve = {
            Op.FORWARD: self._forward,
            Op.BACKWARD: self._backward,
            Op.BACKWARD_INPUT: self._backward_input,
            Op.BACKWARD_WEIGHT: self._backward_weight,
        }[instruction.action.op]
        return resolve(instruction)

    def _made(self, instruction: Compute | Transfer) -> Callable[[Slots], tuple[Arrays, Arrays]]:
        """What an observer is shown of an instruction that was just resolved."""
        if isinstance(instruction, Transfer):
            if instruction.target.stage not in self._traced:
                return lambda slots: ((), ())
            target = self._slot(instruction.target)
            return lambda slots: (slots[target], ())
        if (backward := self._backward_done_with(instruction)) is not None:
            if instruction is backward:
                return lambda slots: ((), ())
            (loss,) = map(self._slot, instruction.writes)
            return lambda slots: (slots[loss], ())
        written = [(self._slot(buffer), buffer.kind in ("r", "w")) for buffer in instruction.writes]
        added = self._named[
            instruction.action.stage, "totals" if instruction.action.op is Op.FORWARD else "accumulators"
        ]

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
        """The slot of a buffer, given one at its first use."""
        if buffer not in self._named:
            self._named[buffer] = self._new_slot()
        return self._named[buffer]

    def _freed(self, indices: list[int]) -> Step:
        self._free += indices

        def free(slots: Slots) -> None:
            for index in indices:
                slots[index] = None

        return free

    def _transfer(self, instruction: Transfer) -> Step:
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
        """What moves the arrays of a boundary, made once for all microbatches."""
        (kind, target), source = (instruction.target.kind, instruction.target.stage), instruction.source.stage
        if (kind, target) not in self._moves:
            # Either side knows what crosses the boundary.
            boundary = self._traced[max(source, target)].boundary_in if max(source, target) in self._traced else None
            boundary = boundary or self._traced[min(source, target)].boundary_out
            assert boundary is not None
            size = next(iter(self._traced.values())).microbatch_size
            on = boundary.on if kind == "x" else boundary.gradients_on
            name = f"{self._name} {kind} {target}"
            self._moves[kind, target] = transfer_between(name, self._meshes[source], on(self._meshes[target], size))
        return self._moves[kind, target]

    def _common(self, instruction: Compute) -> tuple[tuple[int, ...], jax.Array]:
        stage, microbatch = instruction.action.stage, instruction.action.microbatch
        names = ("params", "hoisted", "state", "inputs", "accumulators", "totals")
        return tuple(self._named[stage, name] for name in names), self._microbatches[stage][microbatch]

    def _backward_done_with(self, instruction: Compute) -> Compute | None:
        """The backward that is one program with this forward; of such a backward, itself."""
        return self._backwards.get((instruction.action.stage, instruction.action.microbatch))

    def _forward_backward(self, forward: Compute, backward: Compute) -> Step:
        (params, hoisted, state, inputs, accumulators, totals), microbatch = self._common(forward)
        run = self._programs[forward.action.stage].forward_backward
        x = self._one(forward.reads, "x")
        x_gradients = self._one(backward.writes, "dx", "dy")
        (loss,) = map(self._slot, forward.writes)  # where the residuals would be, for who watches
        assert run is not None

        def forward_backward(slots: Slots) -> None:
            slots[accumulators], into_x, slots[state], slots[totals], slots[loss] = run(
                slots[accumulators],
                slots[params],
                slots[hoisted],
                slots[state],
                () if x is None else slots[x],
                slots[inputs],
                microbatch,
                slots[totals],
            )
            if x_gradients is not None:
                slots[x_gradients] = into_x

        return forward_backward

    def _forward(self, instruction: Compute) -> Step:
        (params, hoisted, state, inputs, _, totals), microbatch = self._common(instruction)
        stage = self._traced[instruction.action.stage]
        run = self._programs[stage.spec.index].forward
        x = self._one(instruction.reads, "x")
        residuals = self._one(instruction.writes, "r")
        output = self._one(instruction.writes, "y", "x")
        keeps_all = self._programs[stage.spec.index].recompute is not None
        assert run is not None
        kept_x = tuple(range(len(stage.x))) if keeps_all else stage.kept_x
        kept_state = tuple(range(len(stage.state))) if keeps_all else stage.kept_state

        def forward(slots: Slots) -> None:
            before, arrays = slots[state], () if x is None else slots[x]
            slots_output, slots[state], fresh, slots[totals] = run(
                slots[params], slots[hoisted], before, arrays, slots[inputs], microbatch, slots[totals]
            )
            if output is not None:
                slots[output] = slots_output
            if residuals is not None:
                kept = tuple([arrays[i] for i in kept_x]), tuple([before[i] for i in kept_state])
                slots[residuals] = (kept, fresh)

        return forward

    def _residuals(self, instruction: Compute) -> Callable[[Slots], tuple[Any, Arrays]]:
        """What backward needs of forward: read from its slot, or computed again."""
        (params, hoisted, _, inputs, _, _), microbatch = self._common(instruction)
        stage = self._traced[instruction.action.stage]
        recompute = self._programs[stage.spec.index].recompute
        residuals = self._one(instruction.reads, "r")
        assert residuals is not None
        kept_x, kept_state = stage.kept_x, stage.kept_state

        def handed_over(slots: Slots) -> tuple[Any, Arrays]:
            kept, fresh = slots[residuals]
            return kept, fresh

        def computed_again(slots: Slots) -> tuple[Any, Arrays]:
            x, before = slots[residuals][0]
            fresh = recompute(slots[params], slots[hoisted], before, x, slots[inputs], microbatch)  # type: ignore[misc]
            return (tuple([x[i] for i in kept_x]), tuple([before[i] for i in kept_state])), fresh

        return handed_over if recompute is None else computed_again

    def _backward(self, instruction: Compute) -> Step:
        (params, hoisted, _, inputs, accumulators, _), microbatch = self._common(instruction)
        run = self._programs[instruction.action.stage].backward
        residuals = self._residuals(instruction)
        output_gradients = self._one(instruction.reads, "dy")
        x_gradients = self._one(instruction.writes, "dx", "dy")
        assert run is not None

        def backward(slots: Slots) -> None:
            kept, fresh = residuals(slots)
            gradients = () if output_gradients is None else slots[output_gradients]
            slots[accumulators], into_x = run(
                slots[accumulators], slots[params], slots[hoisted], slots[inputs], microbatch, kept, fresh, gradients
            )
            if x_gradients is not None:
                slots[x_gradients] = into_x

        return backward

    def _backward_input(self, instruction: Compute) -> Step:
        (params, hoisted, _, inputs, accumulators, _), microbatch = self._common(instruction)
        programs = self._programs[instruction.action.stage].split
        residuals = self._residuals(instruction)
        output_gradients = self._one(instruction.reads, "dy")
        x_gradients = self._one(instruction.writes, "dx", "dy")
        for_weights = self._one(instruction.writes, "w")
        assert programs is not None and for_weights is not None
        run, carried = programs.input, programs.carried

        def backward_input(slots: Slots) -> None:
            kept, fresh = residuals(slots)
            gradients = () if output_gradients is None else slots[output_gradients]
            slots[accumulators], into_x, crossing = run(
                slots[accumulators], slots[params], slots[hoisted], slots[inputs], microbatch, kept, fresh, gradients
            )
            if x_gradients is not None:
                slots[x_gradients] = into_x
            of_microbatch = (*kept[0], *kept[1], *fresh, *gradients)
            slots[for_weights] = (tuple([of_microbatch[i] for i in carried]), crossing)

        return backward_input

    def _backward_weight(self, instruction: Compute) -> Step:
        (params, hoisted, _, inputs, accumulators, _), microbatch = self._common(instruction)
        programs = self._programs[instruction.action.stage].split
        for_weights = self._one(instruction.reads, "w")
        assert programs is not None and for_weights is not None
        run = programs.weight

        def backward_weight(slots: Slots) -> None:
            if run is not None:
                slots[accumulators] = run(
                    slots[accumulators], slots[params], slots[hoisted], slots[inputs], microbatch, *slots[for_weights]
                )

        return backward_weight

    def _reduce(self, stage: int) -> Step:
        run = self._programs[stage].reduce
        accumulators, totals = self._named[stage, "accumulators"], self._named[stage, "totals"]
        assert run is not None

        def reduce(slots: Slots) -> None:
            slots[accumulators], slots[totals] = run(*slots[accumulators], *slots[totals])

        return reduce

    def _one(self, buffers: Sequence[Buffer], *kinds: str) -> int | None:
        """The slot of the one buffer of these kinds, if there is one."""
        return next((self._slot(b) for b in buffers if b.kind in kinds), None)


def _nothing(slots: Slots) -> None:
    pass
