"""Compiling many stages at once: equal ones a single time, all in threads."""

import os
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor

from meshpipe.compiler.compiler import Compiler
from meshpipe.plan.plan import Op
from meshpipe.stage.programs import StagePrograms, compile_stage, copy_stage
from meshpipe.stage.traced import TracedStage

THREADS = min(32, (os.cpu_count() or 1) + 1)
"""One for each core of the machine and one for where another waits. More only take the interpreter from each other."""


def compile_stages(
    traced: dict[int, TracedStage],
    ops: Set[Op],
    remat: Sequence[str],
    compiler: Compiler,
    also: Sequence[Callable[[], None]] = (),
    fused: int | None = None,
) -> dict[int, StagePrograms]:
    """The programs for `ops` of every traced stage, by stage.

    A stage that shares the trace of another, and whose programs cannot be copied, is traced by itself and takes its
    place in `traced`.

    `remat` has the name of every stage; forward and backward of stage `fused` become one program. `also` is done
    while XLA, which takes longest for the stages, is at work.
    """

    def build(stage: TracedStage) -> StagePrograms:
        index = stage.spec.index
        return compile_stage(stage, ops, remat=remat[index], fused=index == fused, compiler=compiler)

    def copied(stage: TracedStage) -> StagePrograms | None:
        if stage.original is None:
            return built[stage.spec.index]
        return copy_stage(built[stage.original.spec.index], stage.spec.mesh, compiler)

    originals = [stage for stage in traced.values() if stage.original is None]
    with ThreadPoolExecutor(THREADS) as pool:
        building = {stage.spec.index: pool.submit(build, stage) for stage in originals}
        others = [pool.submit(task) for task in also]
        built = {index: future.result() for index, future in building.items()}
        copies = list(pool.map(copied, traced.values()))
    for other in others:
        other.result()
    programs: dict[int, StagePrograms] = {}
    for index, found in zip(traced, copies, strict=True):
        if found is None:
            traced[index] = traced[index].retraced()
        programs[index] = found or build(traced[index])
    return programs
