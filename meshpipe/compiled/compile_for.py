"""Compiles every program of a staged model, for devices that may be here or only described, and says what XLA made."""

from collections.abc import Iterator
from typing import Any

import optax

from meshpipe.compiled.program import Analysis, CompiledProgram
from meshpipe.compiler.compiler import Compiler
from meshpipe.layers.staged_model import StagedModel
from meshpipe.optimizer.updates import UpdatePrograms
from meshpipe.phases import phase
from meshpipe.stage.programs import StagePrograms


def compile_for(
    model: StagedModel,
    transformation: optax.GradientTransformation,
    *,
    clip_norm: float | None = None,
    compiler: Compiler | None = None,
) -> tuple[CompiledProgram, ...]:
    """What XLA says of every program that a step of the model runs, stage by stage; nothing is allocated.

    Programs that `StagedModel.compile` has compiled are read as they are; others are compiled now, equal ones once.
    Only stages on devices of this process are compiled; where devices are only described, all are.

    Arguments:
        model: The model, whose rematerialisation is chosen.
        transformation: The optimizer.
        clip_norm: As in the trainer; it does not change what is compiled but for a scalar.
        compiler: What compiles, perhaps with a cache of earlier programs.

    A program that the compiler for a TPU refuses, as it needs more memory than a device has, is among them, without
    its operations. Raises `meshpipe.compiler.refusal.CompilerError`, a `ValueError`, when the compiler fails otherwise.
    """
    compiler = compiler or Compiler()
    updates: list[UpdatePrograms] = []

    def compile_updates() -> None:
        updates.append(UpdatePrograms(transformation, model.parameters, clip_norm))
        updates[0].compile(compiler, inits=False)

    if model.programs:
        compile_updates()
    else:
        model.trace_to_run()
        model.programs = model.compile_programs(compiler, [compile_updates])
    analysis = Analysis()
    with phase("Reading the programs"):
        return tuple(
            analysis.of(program, stage, name, model.stages[stage].submesh)
            for stage in model.local
            for name, program in _named(stage, model.programs[stage], updates[0], model.plan.num_stages)
            if hasattr(program, "memory_analysis") or hasattr(program, "memory")
        )


def _named(stage: int, programs: StagePrograms, updates: UpdatePrograms, num_stages: int) -> Iterator[tuple[str, Any]]:
    for name in ("prepare", "zeros", "forward", "recompute", "backward"):
        yield name, getattr(programs, name)
    if programs.split is not None:
        yield "backward_input", programs.split.input
        yield "backward_weight", programs.split.weight
    yield "forward_backward", programs.forward_backward
    yield "reduce", programs.reduce
    yield "norm", updates.norms[stage]
    yield "update", updates.updates[stage]
    if stage == num_stages - 1:
        yield "summary", updates.summary
