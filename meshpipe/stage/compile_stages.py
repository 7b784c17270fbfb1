"""Compiles all stages at once in threads, and equal stages only once."""

import os
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor

from meshpipe.compiler.compiler import Compiler
from meshpipe.compiler.refusal import compiling_stage
from meshpipe.phases import phase
from meshpipe.plan.plan import Op, Plan
from meshpipe.stage.programs import StagePrograms, compile_stage, copy_stage
from meshpipe.stage.traced import TracedStage

THREADS = min(32, (os.cpu_count() or 1) + 1)
"""One per core, and one more for when another waits. XLA releases the interpreter's lock while it compiles; tracing and
lowering do not, so further threads would only compete for it."""


def compile_stages(
    traced: dict[int, TracedStage],
    ops: Mapping[int, Set[Op]],
    remat: Sequence[str],
    compiler: Compiler,
    also: Sequence[Callable[[], None]] = (),
    fused: int | None = None,
    what: str = "Compiling",
) -> dict[int, StagePrograms]:
    """The compiled programs of every traced stage, by stage number.

    A stage that shares the trace of another, and whose programs cannot be copied, is traced by itself and takes its
    place in `traced`.

    Arguments:
        traced: The stages of this process, by number.
        ops: The kinds of work that the plan has for every stage.
        remat: The rematerialisation of every stage.
        compiler: What compiles, and keeps, the programs.
        also: Further work to do in threads while XLA compiles the stages, such as compiling the optimizer's updates.
        fused: The stage whose forward and backward become one program; None for none.
        what: What to call this, as a phase.
    """

    def build(stage: TracedStage) -> StagePrograms:
        index = stage.spec.index
        with compiling_stage(index):
            programs = compile_stage(stage, ops[index], remat=remat[index], fused=index == fused, compiler=compiler)
        compiling.next()
        return programs

    def copied(stage: TracedStage) -> StagePrograms | None:
        if stage.original is None:
            return built[stage.spec.index]
        return copy_stage(built[stage.original.spec.index], stage.spec.mesh, compiler)

    # Programs are compiled for the stages that were traced, and copied to the submeshes of the stages that share their
    # traces: a copy takes milliseconds.
    originals = [stage for stage in traced.values() if stage.original is None]
    unit = "stage" if len(originals) == len(traced) else "kind of stage"
    with phase(what, unit, len(originals)) as compiling, ThreadPoolExecutor(THREADS) as pool:
        building = {stage.spec.index: pool.submit(build, stage) for stage in originals}
        # After the stages: these take longest, and a thread that is free takes the next in order.
        others = [pool.submit(task) for task in also]
        built = {index: future.result() for index, future in building.items()}
        copies = list(pool.map(copied, traced.values()))
        compiling.end()
        with phase("Initialising"):
            for other in others:
                other.result()
    # A program with a Python callback, for example, cannot be copied, since it cannot be serialised.
    programs: dict[int, StagePrograms] = {}
    for index, found in zip(traced, copies, strict=True):
        if found is None:
            traced[index] = traced[index].retraced()
        programs[index] = found or build(traced[index])
    return programs


def ops_of_stages(plan: Plan) -> dict[int, frozenset[Op]]:
    """The kinds of work of every stage. Stages of one kind get the same, so that they can share programs."""
    graph = plan.graph
    kinds = [(graph.trains[s], graph.has_backward(s)) for s in range(plan.num_stages)]
    found: dict[tuple[bool, bool], set[Op]] = {kind: set() for kind in kinds}
    for action in plan.actions:
        found[kinds[action.stage]].add(action.op)
    return {s: frozenset(found[kind]) for s, kind in enumerate(kinds)}
