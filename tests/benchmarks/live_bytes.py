"""The bytes that are alive on each device while a step runs, one program after the other."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import optax

from meshpipe.layers.initialise import initialise
from meshpipe.layers.staged_model import StagedModel
from meshpipe.optimizer.optimizer import Optimizer
from meshpipe.pipeline.executor import Executor
from meshpipe.plan.lower import lower
from meshpipe.stage.programs import StagePrograms


class LiveBytes:
    """Peaks over samples of the arrays that came to be since it was made; a buffer of several arrays counts once."""

    def __init__(self) -> None:
        self._before = jax.live_arrays()  # held, so that no later buffer has the address of one of these
        self._known = {place for place, _ in _buffers(self._before)}
        self.peaks: Counter[jax.Device] = Counter()

    def sample(self) -> None:
        arrays = jax.block_until_ready(jax.live_arrays())
        found = {place: size for place, size in _buffers(arrays) if place not in self._known}
        now: Counter[jax.Device] = Counter()
        for (device, _), size in found.items():
            now[device] += size
        self.peaks |= now


def _buffers(arrays: list[jax.Array]) -> list[tuple[tuple[jax.Device, int], int]]:
    shards = [(shard.device, shard.data) for array in arrays for shard in array.addressable_shards]
    return [((device, data.unsafe_buffer_pointer()), data.nbytes) for device, data in shards if data.nbytes]


def measure_peaks(model: StagedModel, transformation: optax.GradientTransformation, batch: dict[str, Any]) -> list[int]:
    """For each rank, the most bytes that one of its devices holds at the end of any program of a step.

    Then both what the program reads and what it makes are there. Every program is waited for, so that nothing else
    runs.
    """
    live = LiveBytes()
    optimizer = Optimizer(transformation, model.parameters)
    made = initialise(model.layers_on_submeshes, model.rules, 0, model.target)
    params = {path: leaf for layer, _ in made for path, leaf in layer.items()}
    state = {path: leaf for _, layer in made for path, leaf in layer.items()}
    del made
    params_of = {s: tuple(params[path] for path in stage.params) for s, stage in enumerate(model.parameters)}
    state_of = {s: tuple(state[path] for path in stage.state) for s, stage in enumerate(model.parameters)}
    optimizer_state = optimizer.init(params_of)
    model.compile()
    programs = {s: _watched(of_stage, live.sample) for s, of_stage in model.programs.items()}
    program = lower(model.plan, reduces=any(of_stage.reduce is not None for of_stage in programs.values()))
    executor = Executor("train", program, [stage.submesh for stage in model.stages], model.traced, programs)
    inputs = model.inputs(batch, model.place_seed(0), 0)
    executor.run(params_of, state_of, inputs)
    del optimizer_state
    return [max(live.peaks[device] for device in model.stages[s].submesh.devices.flat) for s in _first_stages(model)]


def _first_stages(model: StagedModel) -> list[int]:
    return [model.plan.stages_of(rank)[0] for rank in range(model.plan.num_ranks)]


def _watched(programs: StagePrograms, sample: Callable[[], None]) -> StagePrograms:
    """The programs, each followed by a sample."""

    def watch(run: Any) -> Any:
        def watched(*arguments: Any) -> Any:
            results = run(*arguments)
            sample()
            return results

        return None if run is None else watched

    split = programs.split and replace(
        programs.split, input=watch(programs.split.input), weight=watch(programs.split.weight)
    )
    return replace(
        programs,
        forward=watch(programs.forward),
        recompute=watch(programs.recompute),
        backward=watch(programs.backward),
        forward_backward=watch(programs.forward_backward),
        split=split,
    )
