"""Compares the memory that weights, caches and activations need with what is free, before it is taken."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from meshpipe.choose.capacity import Need, Parts, free_in, needs_of_devices
from meshpipe.choose.memory import device_bytes
from meshpipe.compiler.described import MemoryStats
from meshpipe.errors import ArgumentError
from meshpipe.layers.staged_model import StagedModel
from meshpipe.machine import format_bytes
from meshpipe.mesh import on_cpu
from meshpipe.plan.partition import partition_by_cost
from meshpipe.stage.programs import StagePrograms


def check_weights(model: StagedModel) -> None:
    """Raises `ArgumentError` when the weights do not fit into the memory that is free; names a pipeline that does."""
    stages = model.parameters
    ranks = [{"weights": device_bytes([*stage.all_params.values(), *stage.state.values()])} for stage in stages]
    if (need := lacking(model.mesh, ranks)) is None:
        return
    raise ArgumentError(
        f"The weights must fit into {need.where}. They need {format_bytes(need.total)}, and {format_bytes(need.free)} "
        f"are free. {_way_out(model, need.free)}"
    )


def check_activations(
    programs: Mapping[int, StagePrograms], mesh: Mesh, *, at_once: int, what: str, way_out: str
) -> None:
    """Raises `ArgumentError`, with a `way_out`, when what the compiled forwards of the local stages hold while they run
    does not fit into the memory that is free now. `what` calls them, and `at_once` is how many ranks work at a time.
    """
    ranks = [{"activations": _inside(programs.get(s))} for s in range(mesh.devices.shape[0])]
    if on_cpu(mesh):  # where all ranks share a memory, those that wait hold nothing
        busiest = sorted(range(len(ranks)), key=lambda s: ranks[s]["activations"], reverse=True)[:at_once]
        ranks = [own if s in busiest else {"activations": 0} for s, own in enumerate(ranks)]
    if (need := lacking(mesh, ranks)) is not None:
        raise ArgumentError(
            f"The activations of {what} must fit into {need.where}. They need {format_bytes(need.total)}, and "
            f"{format_bytes(need.free)} are free. {way_out}"
        )


def _inside(programs: StagePrograms | None) -> int:
    """Bytes that a forward takes on each device beside its arguments. 0 for a stage of another process, and where XLA
    does not say.
    """
    if programs is None or programs.forward is None:
        return 0
    forward: Any = programs.forward
    try:
        stats = MemoryStats.of(forward)
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return 0
    return stats.outputs - stats.aliased + stats.temporaries


def lacking(mesh: Mesh, ranks: Sequence[Parts]) -> Need | None:
    """The memory of this process that lacks most for what each device of every rank needs; None where nothing lacks."""
    free = free_in(mesh)
    needs = _of_host(mesh, ranks, free[None]) if on_cpu(mesh) else needs_of_devices(mesh.devices, ranks, {}, free)
    return max((need for need in needs if need.missing), key=lambda need: need.missing, default=None)


def _of_host(mesh: Mesh, ranks: Sequence[Parts], free: int | None) -> list[Need]:
    """All virtual CPU devices of this process share its memory."""
    parts, count = Counter[str](), 0
    for devices, of_device in zip(mesh.devices, ranks, strict=True):
        here = sum(device.process_index == jax.process_index() for device in devices.flat)
        parts.update({name: here * size for name, size in of_device.items()})
        count += here
    shared = "" if count == 1 else f", which its {count} virtual CPU devices share"
    return [] if free is None else [Need(f"the memory of this machine{shared}", free, parts)]


def _way_out(model: StagedModel, free: int) -> str:
    smaller = "A smaller `dtype` or `param_dtype`, bfloat16, takes half of float32."
    if on_cpu(model.mesh):
        return f"{smaller} Or use a machine with more memory, or several: `meshpipe launch --help`."
    ranks = _ranks_that_fit(model, free)
    if ranks is None:
        return f"{smaller} Or make the tensor axis of the mesh larger, `mesh.tensor`."
    needed, there = ranks * model.mesh.devices[0].size, len(jax.devices())
    has = "" if needed <= there else f", of which {there} are there"
    return f"Pass `mesh.pipeline` {ranks}, for {needed} devices{has}. {smaller}"


def _ranks_that_fit(model: StagedModel, free: int) -> int | None:
    """The fewest ranks of a pipeline on which the weights fit; None where none are enough."""
    sizes = [0] * len(model.layers)
    for stage in model.parameters:
        for path, leaf in stage.all_params.items():
            sizes[int(path.split("/")[1])] += device_bytes([leaf])
    for ranks in range(model.mesh.devices.shape[0] + 1, len(sizes) + 1):
        cuts = partition_by_cost(sizes, range(ranks))
        if max(sum(sizes[i] for i in cut) for cut in cuts) <= free:
            return ranks
    return None
