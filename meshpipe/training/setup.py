"""Sets up a trainer: chooses the plan, compiles the programs, places the parameters.

Several processes compare what each would run before anything moves between them.
"""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import optax
from jax.sharding import Mesh

from meshpipe.choose.capacity import MemoryCheck
from meshpipe.choose.chooser import Chooser, check_costs
from meshpipe.compiler.cache import open_cache
from meshpipe.compiler.compiler import Compiler
from meshpipe.environment import check_settings
from meshpipe.errors import check_clip_norm, check_seed
from meshpipe.layers.description import describe_model, describe_programs
from meshpipe.layers.initialise import initialise
from meshpipe.layers.layer import Leaves
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.optimizer.optimizer import Optimizer
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.tied import TiedLeaves
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.rendezvous import check_lowered
from meshpipe.processes.agreement import AGREE_SECONDS, agree, report_failure
from meshpipe.processes.group import Group
from meshpipe.processes.uneven_exit import watch, watch_keys
from meshpipe.stage.target import Target
from meshpipe.training.state import StartingState, TrainingState

Check = Callable[[StagedModel], StartingState | None]


@dataclass(frozen=True)
class Setup:
    """What a trainer is made of."""

    seed: int
    group: Group
    """The processes with devices of the mesh."""
    model: StagedModel
    optimizer: Optimizer
    tied: TiedLeaves
    training: TrainingState
    step: int
    """The update after which training starts; 0 with first values."""
    seed_data: dict[int, jax.Array]
    """The seed's key data on every local stage's submesh."""
    compile_seconds: float
    """Seconds for compilation and initialisation, after the plan was chosen."""


def set_up(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None,
    pipeline: PipelineConfig | None,
    seed: int,
    clip_norm: float | None,
    compile_cache: str | None,
    target: Target | None,
    check_memory: bool = False,
    check: Check | None = None,
    copies: int = 0,
) -> Setup:
    """Chooses, compiles and places; arguments are those of `Trainer`. `check` sees a model that fits into the memory,
    before it is traced, and may return what to start from: then no first values are made. `copies` is that of
    `MemoryCheck`.

    Raises `ValueError` where a trainer does.
    """
    check_settings()
    check_seed(seed)
    check_clip_norm(clip_norm)
    mesh = make_mesh() if mesh is None else mesh
    pipeline = PipelineConfig() if pipeline is None else pipeline
    chooser = Chooser(task, optimizer, mesh=mesh, config=pipeline, target=target)
    group = Group(device.process_index for device in chooser.mesh.devices.flat)
    if not group.is_alone:
        watch_keys()
    with report_failure(group, "model"):
        if not group.is_alone:
            check_costs(chooser.config)
        model = chooser.choose()
        check_lowered(model.lowered)
    if not group.is_alone:
        agree(group, "model", describe_model(model) | {"seed": str(seed), "clip norm": str(clip_norm)})
    with report_failure(group, "memory"):
        memory = MemoryCheck(chooser.transformation, copies, _neighbours(group)) if check_memory else None
        if memory is not None:
            memory.least(model)
            memory = memory.as_of_now(model.mesh)
    if not group.is_alone:  # a `check` waits for all processes
        agree(group, "memory", {})
    with report_failure(group, "programs"):
        start = None if check is None else check(model)
        started = time.perf_counter()
        updates, tied, frozen_tied, made = _compile(
            model, chooser.transformation, group.name, seed, clip_norm, compile_cache, memory, start
        )
    if not group.is_alone:  # until here nothing has moved
        agree(group, "programs", describe_programs(model) | updates.description())
    watch(group)
    seed_data = model.place_seed(seed)
    training = TrainingState(model.parameters, model.local, updates, tied, frozen_tied, made, start)
    step = 0 if start is None else start.step
    return Setup(seed, group, model, updates, tied, training, step, seed_data, time.perf_counter() - started)


def _neighbours(group: Group) -> set[int]:
    """The other processes of the group on this machine."""
    hosts = group.gather("hosts", socket.gethostname(), AGREE_SECONDS)
    return {process for process, host in zip(group.processes, hosts, strict=True) if host == socket.gethostname()}


def _compile(
    model: StagedModel,
    transformation: optax.GradientTransformation,
    name: str,
    seed: int,
    clip_norm: float | None,
    compile_cache: str | None,
    memory: MemoryCheck | None,
    start: StartingState | None,
) -> tuple[Optimizer, TiedLeaves, TiedLeaves, list[tuple[Leaves, Leaves]]]:
    """Compiles everything that a step runs, and gives the local layers, in the same pool of threads, first values where
    `start` has none.
    """
    tied = TiedLeaves(model.tied_and_trained, model.parameters, f"{name}/tied")
    frozen = [StageParameters(stage.mesh, stage.frozen_params, {}) for stage in model.parameters]
    frozen_tied = TiedLeaves(model.tied_and_frozen, frozen, f"{name}/tied and frozen")
    cache = open_cache(compile_cache)
    compiler = Compiler(cache)
    optimizers: list[Optimizer] = []
    made: list[tuple[Leaves, Leaves]] = []
    held = frozenset() if start is None else start.paths

    def make_optimizer() -> None:
        optimizers.append(Optimizer(transformation, model.parameters, clip_norm, name))
        optimizers[0].compile(compiler)

    def make_parameters() -> None:
        lacking = [
            (layer, mesh)
            for layer, mesh in model.layers_on_submeshes
            if any(path not in held for path in (*layer.params, *layer.state))
        ]
        if lacking:
            made.extend(initialise(lacking, model.rules, seed, model.target, compiler, held))

    try:
        model.compile([make_optimizer, make_parameters], compiler, name, None if memory is None else memory.traced)
    except BaseException:
        if cache is not None:
            cache.remove_if_empty()
        raise
    model.release()
    return optimizers[0], tied, frozen_tied, made
