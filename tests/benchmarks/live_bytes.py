"""The bytes that are alive on each device while a step runs, one program after the other, and those inside programs."""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import jax
import optax
from jax.sharding import Mesh

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
        self.needs: Counter[jax.Device] = Counter()
        """The peaks with what the programs needed inside themselves, as XLA says."""

    def sample(self, devices: Collection[jax.Device] = (), inside: int = 0) -> None:
        """Looks at what is there after a program has run on some devices, which took so many bytes inside itself."""
        arrays = jax.block_until_ready(jax.live_arrays())
        found = {place: size for place, size in _buffers(arrays) if place not in self._known}
        now: Counter[jax.Device] = Counter()
        for (device, _), size in found.items():
            now[device] += size
        self.peaks |= now
        for device in devices:
            now[device] += inside
        self.needs |= now


def _buffers(arrays: list[jax.Array]) -> list[tuple[tuple[jax.Device, int], int]]:
    shards = [(shard.device, shard.data) for array in arrays for shard in array.addressable_shards]
    return [((device, data.unsafe_buffer_pointer()), data.nbytes) for device, data in shards if data.nbytes]


def measure_peaks(model: StagedModel, transformation: optax.GradientTransformation, batch: dict[str, Any]) -> list[int]:
    """For each rank, the most bytes that one of its devices holds at the end of any program of a step.

    Then both what the program reads and what it makes are there. Every program is waited for, so that nothing else
    runs.
    """
    return _of_ranks(model, _watch_step(model, transformation, batch, update=False).peaks)


def measure_needs(model: StagedModel, transformation: optax.GradientTransformation, batch: dict[str, Any]) -> list[int]:
    """The same with the temporary memory of the program that runs, over a step and the update that follows."""
    return _of_ranks(model, _watch_step(model, transformation, batch, update=True).needs)


def measure_both(
    model: StagedModel, transformation: optax.GradientTransformation, batch: dict[str, Any]
) -> tuple[list[int], list[int]]:
    """For each rank, the peak of its arrays, and the peak with temporary memory, over a step and the update."""
    live = _watch_step(model, transformation, batch, update=True)
    return _of_ranks(model, live.peaks), _of_ranks(model, live.needs)


def _watch_step(
    model: StagedModel, transformation: optax.GradientTransformation, batch: dict[str, Any], *, update: bool
) -> LiveBytes:
    live = LiveBytes()
    optimizer = Optimizer(transformation, model.parameters)
    made = initialise(model.layers_on_submeshes, model.rules, 0, model.target)
    params = {path: leaf for layer, _ in made for path, leaf in layer.items()}
    state = {path: leaf for _, layer in made for path, leaf in layer.items()}
    del made
    params_of = {s: tuple(params.pop(path) for path in stage.params) for s, stage in enumerate(model.parameters)}
    state_of = {s: tuple(state.pop(path) for path in stage.state) for s, stage in enumerate(model.parameters)}
    optimizer_state = optimizer.init(params_of)
    model.compile()
    if update:
        optimizer = Optimizer(transformation, model.parameters)
        optimizer.compile()
    programs = {s: _watched(of_stage, live, model.stages[s].submesh) for s, of_stage in model.programs.items()}
    program = lower(model.plan, reduces=any(of_stage.reduce is not None for of_stage in programs.values()))
    executor = Executor("train", program, [stage.submesh for stage in model.stages], model.traced, programs)
    # Inputs belong to the step alone, as in a trainer.
    gradients, after, sums = executor.run(params_of, state_of, model.inputs(batch, model.place_seed(0), 0))
    if update:
        watched = optimizer._programs
        for of_stage in (watched.norms, watched.updates):
            for s, compiled in of_stage.items():
                of_stage[s] = _watch(compiled, live, model.stages[s].submesh)
        optimizer.update(params_of, optimizer_state, gradients, state_of, after, sums)
    return live


def _of_ranks(model: StagedModel, peaks: Counter[jax.Device]) -> list[int]:
    return [max(peaks[device] for device in model.stages[s].submesh.devices.flat) for s in _first_stages(model)]


def _first_stages(model: StagedModel) -> list[int]:
    return [model.plan.stages_of(rank)[0] for rank in range(model.plan.num_ranks)]


def _watched(programs: StagePrograms, live: LiveBytes, mesh: Mesh) -> StagePrograms:
    """The programs, each followed by a sample."""
    split = programs.split and replace(
        programs.split, **{name: _watch(getattr(programs.split, name), live, mesh) for name in ("input", "weight")}
    )
    names = ("prepare", "zeros", "forward", "recompute", "backward", "forward_backward", "reduce")
    return replace(programs, split=split, **{name: _watch(getattr(programs, name), live, mesh) for name in names})


def _watch(run: Any, live: LiveBytes, mesh: Mesh) -> Any:
    if not isinstance(run, jax.stages.Compiled):
        return run  # none, or one that makes nothing
    analysis: Any = run.memory_analysis()

    def watched(*arguments: Any) -> Any:
        results = run(*arguments)
        live.sample(list(mesh.devices.flat), analysis.temp_size_in_bytes)
        return results

    return watched
