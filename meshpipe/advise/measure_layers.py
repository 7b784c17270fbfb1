"""Measures the layers of a run on the devices of this machine, for every size of the tensor axis."""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import jax
import numpy as np

from meshpipe.advise.cases import Case, Cases
from meshpipe.advise.measure_update import update_seconds
from meshpipe.advise.measured import LayerLines, Line, Measured
from meshpipe.choose.chooser import Chooser
from meshpipe.choose.compiled_memory import device_bytes
from meshpipe.choose.layer_run import LayerRun
from meshpipe.choose.profile import layer_key
from meshpipe.compiler.cache import open_cache
from meshpipe.compiler.compiler import Compiler
from meshpipe.config import Config
from meshpipe.mesh import TENSOR, make_mesh
from meshpipe.phases import each, phase
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.plan import Op
from meshpipe.sharding import PRESETS, Arrays
from meshpipe.stage.programs import StagePrograms, compile_stage
from meshpipe.stage.traced import TracedStage

PASSES = 3
"""How often everything is measured, one after the other: the speed of a machine changes from minute to minute. The
fastest of all counts: what else runs only adds to it.
"""
PASS_SECONDS = 0.12
"""How long each program is timed in a pass at least, in turns."""
TURN_SECONDS = 0.03
"""How long the calls of a turn take at least."""
MOST_CALLS = 16
"""Of a turn."""
MOST_TURNS = 4


@dataclass(frozen=True)
class _Stack:
    """Equal layers that follow one another, as one stage."""

    stage: TracedStage
    inputs: Arrays
    num_layers: int


@dataclass(frozen=True)
class _Sample:
    """The layers in one setting."""

    case: Case
    stacks: Mapping[int, _Stack]
    """One for each kind of layer."""


_Times = Mapping[int, Mapping[Op, float]]
"""The seconds of each program of a layer, by the kind of the layer."""


def measure_layers(config: Config, devices: Sequence[jax.Device], cases: Cases) -> Measured:
    """The times of every layer of a run on these devices, all of them busy at once. The layout of the run does not
    matter.

    Raises `ValueError` when the layers cannot be had, or do not divide.
    """
    layers = _Layers(config, devices)
    samples = [layers.sample(case) for case in each("Tracing layers,", "setting", cases.cases)]
    programs = _compile(samples, Compiler(open_cache(config.compile_cache)), splits=cases.splits)
    found: dict[Case, _Times] = {}
    what = f"Measuring layers (about {max(1.0, cases.seconds):.0f} s),"
    for sample, of_kinds in each(what, "setting", PASSES * list(zip(samples, programs, strict=True))):
        times = {kind: _seconds_of_programs(sample.stacks[kind], made) for kind, made in of_kinds.items()}
        found[sample.case] = _fastest(found.get(sample.case), times)
    with phase("Measuring the update"):
        per_byte = layers.update_seconds(cases.cases[0])
    return _measured(layers, samples, found, per_byte)


class _Layers:
    """The layers of a run, in any setting."""

    def __init__(self, config: Config, devices: Sequence[jax.Device]) -> None:
        self._devices, self._task = devices, config.task()
        self._transformation = config.optimizer.build(config.steps)
        chooser, _ = self._chooser(Case(1, 1))
        layers = chooser.layer_by_layer(chooser.mesh).trace()
        keys = [layer_key(layer) for layer in layers]
        self.kinds = [keys.index(key) for key in keys]
        """Of every layer, the first of the same programs."""
        self.is_split = [any(TENSOR in str(shape.sharding.spec) for shape in layer.params) for layer in layers]
        """Of every layer, whether the tensor axis splits it."""

    def sample(self, case: Case) -> _Sample:
        chooser, batch = self._chooser(case)
        cuts = _stacks(self.kinds, case.together)
        model = chooser.layer_by_layer(chooser.mesh, cuts)
        stages = model.trace()
        model.traced = dict(enumerate(stages))
        inputs = model.inputs(batch, model.place_seed(0), 0)
        stacks: dict[int, _Stack] = {}
        for place, cut in enumerate(cuts):
            kind, stack = self.kinds[cut.start], _Stack(stages[place], inputs[place], len(cut))
            stacks[kind] = max(stack, stacks.get(kind, stack), key=lambda stack: stack.num_layers)
        return _Sample(case, stacks)

    def update_seconds(self, case: Case) -> float:
        """Of each byte of parameters on a device, as those of the largest layer take them."""
        chooser, _ = self._chooser(case)
        stages = chooser.layer_by_layer(chooser.mesh).parameters
        largest = max(stages, key=lambda stage: device_bytes(stage.params.values()))
        seconds = update_seconds(self._transformation, largest)
        return seconds / max(1, device_bytes(largest.params.values()))

    def _chooser(self, case: Case) -> tuple[Chooser, Mapping[str, Any]]:
        data = len(self._devices) // case.tensor
        batch = {name: _rows(value, case.examples * data) for name, value in self._task.batch.items()}
        mesh = make_mesh(data=data, tensor=case.tensor, devices=self._devices)
        task = replace(self._task, batch=batch, rules=PRESETS["replicated"], notes=None)
        return Chooser(task, self._transformation, mesh=mesh, config=PipelineConfig(remat=case.remat)), batch


def _rows(value: Any, count: int) -> Any:
    rows = np.asarray(value)
    return np.resize(rows, (count, *rows.shape[1:]))


def _stacks(kinds: Sequence[int], most: int) -> list[range]:
    """Cuts of as many equal layers that follow one another, at most."""
    cuts, start = [], 0
    for _, equal in groupby(kinds):
        stop = start + len(list(equal))
        cuts += [range(first, min(first + most, stop)) for first in range(start, stop, most)]
        start = stop
    return cuts


def _compile(samples: Sequence[_Sample], compiler: Compiler, *, splits: bool) -> list[dict[int, StagePrograms]]:
    """The programs of each kind of layer of each sample."""
    found: list[dict[int, StagePrograms]] = [{} for _ in samples]
    wanted = [(index, kind) for index, sample in enumerate(samples) for kind in sample.stacks]
    with phase("Compiling layers,", "stage", len(wanted)) as compiling, ThreadPoolExecutor() as pool:

        def build(index: int, kind: int) -> None:
            stage, remat = samples[index].stacks[kind].stage, samples[index].case.remat
            ops = set(Op) if splits and remat == "none" else {Op.FORWARD, Op.BACKWARD}
            found[index][kind] = compile_stage(stage, ops, remat=remat, compiler=compiler)
            compiling.next()

        for future in [pool.submit(build, *one) for one in wanted]:
            future.result()
    return found


def _seconds_of_programs(stack: _Stack, programs: StagePrograms) -> dict[Op, float]:
    """The time of each program for one layer, among calls that follow one another as in a step: none waits."""
    run = LayerRun(stack.stage, programs, stack.inputs)
    found = {}
    for op, call in run.calls().items():
        first = _seconds(call, 1)
        count = max(1, min(math.ceil(TURN_SECONDS / first), MOST_CALLS))
        turns = max(1, min(math.ceil(PASS_SECONDS / first / count), MOST_TURNS))
        found[op] = min(_seconds(call, count) for _ in range(turns)) / count / stack.num_layers
    return found


def _seconds(call: Callable[[], Any], count: int) -> float:
    """Until the results of so many calls are there."""
    began = time.perf_counter()
    results = [call() for _ in range(count)]
    jax.block_until_ready([leaf for leaf in jax.tree.leaves(results) if not leaf.is_deleted()])
    return time.perf_counter() - began


def _fastest(before: _Times | None, now: _Times) -> _Times:
    if before is None:
        return now
    return {kind: {op: min(before[kind][op], now[kind][op]) for op in of_kind} for kind, of_kind in now.items()}


def _measured(layers: _Layers, samples: Sequence[_Sample], times: Mapping[Case, _Times], per_byte: float) -> Measured:
    stacked = [sample for sample in samples if sample.case.together > 1] or samples
    apart = next((times[sample.case] for sample in samples if sample.case.together == 1), {})
    per_call = _per_call(stacked[0], times[stacked[0].case], apart)
    found = {}
    for tensor in sorted({sample.case.tensor for sample in stacked}):
        own = [sample for sample in stacked if sample.case.tensor == tensor]
        of_kinds = {kind: _lines(own, times, kind, per_call) for kind in set(layers.kinds)}
        found[tensor] = [of_kinds[kind] for kind in layers.kinds]
    return Measured(found, layers.is_split, per_call, per_byte)


def _per_call(sample: _Sample, together: _Times, apart: _Times) -> float:
    """What a call of a program takes whatever its layers: what they take less if one call has several. 0 where none
    has, or they were not measured apart.
    """
    found = []
    for kind, stack in sample.stacks.items():
        if stack.num_layers > 1 and kind in apart:
            less = [apart[kind][op] - seconds for op, seconds in together[kind].items()]
            found.append(statistics.mean(less) * stack.num_layers / (stack.num_layers - 1))
    return max(0.0, statistics.median(found)) if found else 0.0


def _lines(samples: Sequence[_Sample], times: Mapping[Case, _Times], kind: int, per_call: float) -> LayerLines:
    """The lines through what was measured of a layer, without what calls take."""
    points: dict[str, dict[Op, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for sample in sorted(samples, key=lambda sample: sample.case.examples):
        own = per_call / sample.stacks[kind].num_layers
        for op, seconds in times[sample.case][kind].items():
            points[sample.case.remat][op].append((float(sample.case.examples), max(0.0, seconds - own)))
    programs = {op: Line(found) for op, found in points.pop("none").items()}
    again = {
        remat: Line([(0.0, 0.0), *((x, max(0.0, y - programs[Op.BACKWARD].of(x))) for x, y in found[Op.BACKWARD])])
        for remat, found in points.items()
        if Op.BACKWARD in found
    }
    return LayerLines(programs, {**again, "full": programs[Op.FORWARD]})
