"""What the stages of a plan hold once XLA has compiled their programs: sizes that XLA decides on, as it says them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from meshpipe.compiled.program import CompiledProgram
from meshpipe.plan.plan import Op
from meshpipe.plan.stage_memory import StageMemory
from meshpipe.stage.traced import TracedStage

ProgramsOfStage = Mapping[str, CompiledProgram]
"""The programs of one stage by name."""


def programs_of_stages(programs: Sequence[CompiledProgram]) -> dict[int, ProgramsOfStage]:
    """Programs by stage and name."""
    found: dict[int, dict[str, CompiledProgram]] = defaultdict(dict)
    for program in programs:
        found[program.stage][program.name] = program
    return dict(found)


def with_compiled(memory: StageMemory, stage: TracedStage, programs: ProgramsOfStage) -> StageMemory:
    """What a stage holds of a microbatch, by its compiled programs; as it was where there are none.

    What forward returns besides its values and state are residuals, in the layout that XLA chose for them; so is what
    the input part of a split backward makes for the weight part.
    """
    if (both := programs.get("forward_backward")) is not None:
        # Residuals never leave the program. What it is handed stays until it ends.
        inside = both.needs - sum(memory.input_gradients)
        return replace(
            memory,
            activation=sum(memory.inputs),
            kept_inputs=memory.inputs,
            recomputed=0,
            temporaries={Op.BACKWARD: max(inside, both.temporaries)},
        )
    forward, again = programs.get("forward"), programs.get("recompute")
    if forward is None:
        return memory
    temporaries: dict[Op, float] = {Op.FORWARD: forward.temporaries}
    if (made := again or forward) is not None and stage.spec.has_backward:
        memory = _with_residuals(memory, stage, made, is_again=again is not None)
    into_x = sum(memory.input_gradients)
    for op, name in ((Op.BACKWARD, "backward"), (Op.BACKWARD_WEIGHT, "backward_weight")):
        if (program := programs.get(name)) is not None:
            handed_on = into_x if op is Op.BACKWARD else 0
            temporaries[op] = max(program.temporaries, program.needs - handed_on)
    if (first := programs.get("backward_input")) is not None:
        crossing = max(0, first.outputs - first.aliased - into_x)
        memory = replace(memory, made_for_weights=memory.found_for_weights + crossing)
        temporaries[Op.BACKWARD_INPUT] = first.temporaries
    if again is not None:
        for op in temporaries.keys() & {Op.BACKWARD, Op.BACKWARD_INPUT}:
            temporaries[op] = max(temporaries[op], again.temporaries)
    return replace(memory, temporaries=temporaries)


def _with_residuals(memory: StageMemory, stage: TracedStage, made: CompiledProgram, *, is_again: bool) -> StageMemory:
    """With the residuals that a program makes: `recompute`, or else forward."""
    returned = made.outputs - made.aliased
    if is_again:
        found, estimated = returned, memory.recomputed
    else:
        values = (boundary.on(stage.spec.mesh, stage.microbatch_size) for boundary in stage.boundaries_out)
        found = returned - sum(device_bytes(leaves) for leaves in values) - device_bytes(stage.state)
        kept_state = device_bytes(stage.state[i] for i in stage.kept_state)
        estimated = memory.activation - sum(memory.kept_inputs) - kept_state
    found = max(0, found)
    share = found / estimated if estimated else 1.0
    # Of what the weight part reads, most are residuals: it is smaller or larger as they are.
    memory = replace(
        memory, kept_for_weights=share * memory.kept_for_weights, found_for_weights=share * memory.found_for_weights
    )
    if is_again:
        return replace(memory, recomputed=found)
    return replace(memory, activation=memory.activation - estimated + found)


def leaf_bytes(leaves: Iterable[Any]) -> list[int]:
    """Bytes that one device holds of each leaf, by their shardings."""
    return [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves]


def device_bytes(leaves: Iterable[Any]) -> int:
    """Bytes that one device holds of the leaves, by their shardings."""
    return sum(leaf_bytes(leaves))
