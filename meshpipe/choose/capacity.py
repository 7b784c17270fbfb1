"""Compares the memory that a run needs with the memory that there is, before anything is allocated."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from meshpipe.choose.memory import (
    ONE_UNIT_EACH,
    RankMemory,
    device_bytes,
    microbatch_memories,
    predict_memory,
)
from meshpipe.errors import ArgumentError
from meshpipe.layers.staged_model import StagedModel
from meshpipe.machine import format_bytes, free_memory
from meshpipe.mesh import DATA, PIPELINE, on_cpu
from meshpipe.optimizer.state import state_shapes
from meshpipe.plan.simulate import StageMemory, simulate
from meshpipe.stage.jaxpr import nbytes

Parts = Mapping[str, int]
"""Bytes by what they are for."""
Free = Mapping[Any, int | None]
"""Free bytes by device, or of the host by None; None where they are not known."""
MANY_TIMES = 4
"""A step whose upper bound fits so often is not looked at more closely."""


@dataclass(frozen=True)
class Need:
    """The bytes that a run needs in one memory, by what they are for, and the bytes that are free there."""

    where: str
    free: int
    parts: Parts

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def missing(self) -> int:
        return max(0, self.total - self.free)


def least_memory(model: StagedModel, transformation: optax.GradientTransformation) -> list[Parts]:
    """What each device of every rank holds without batch and activations, by the shapes alone; traces nothing."""
    ranks: list[Parts] = []
    for rank in range(model.plan.num_ranks):
        stages = [model.parameters[stage] for stage in model.plan.stages_of(rank)]
        trained = [leaf for stage in stages for leaf in stage.params.values()]
        sizes = {
            "parameters": [leaf for stage in stages for leaf in stage.all_params.values()],
            "gradients": [leaf.update(dtype=jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in trained],
            "optimizer": [leaf for stage in stages for leaf in jax.tree.leaves(state_shapes(transformation, stage))],
        }
        ranks.append({name: device_bytes(leaves) for name, leaves in sizes.items()})
    return ranks


def with_own_activations(model: StagedModel, ranks: Sequence[Parts]) -> list[Parts]:
    """The ranks with the activations of the stages that are traced here; those of other stages count as none."""
    own, remat = list(model.traced), model.remat
    assert remat is not None, "remat is to be chosen first"
    found = microbatch_memories([model.traced[s] for s in own], [remat[s] for s in own], model.plan)
    known = dict(zip(own, found, strict=True))
    memory = [known.get(stage, StageMemory(activation=0)) for stage in range(model.plan.num_stages)]
    peaks = simulate(model.plan, ONE_UNIT_EACH, memory, model.late).peak_bytes
    return [{**parts, "activations": round(peak)} for parts, peak in zip(ranks, peaks, strict=True)]


@dataclass(frozen=True)
class MemoryCheck:
    """Refuses a model whose step needs more memory than there is."""

    transformation: optax.GradientTransformation
    copies: int = 0
    """How often parameters, state and optimizer state are held once more, whole and on the first device."""
    neighbours: Collection[int] = ()
    """The other processes on this machine, whose CPU devices share its memory."""
    free: Free | None = None
    """What was free before anything was allocated for the model; None looks when asked."""

    def as_of_now(self, mesh: Mesh) -> "MemoryCheck":
        """The same, for after arrays of the model are there, which otherwise would count as needed and in use."""
        return replace(self, free=free_in(mesh))

    def least(self, model: StagedModel) -> None:
        """Raises `ArgumentError` when parameters, gradients and optimizer state alone do not fit; traces nothing."""
        self._check(model, least_memory(model, self.transformation))

    def traced(self, model: StagedModel) -> None:
        """Raises `ArgumentError` when a step does not fit, by `predict_memory`; to be called once the model is traced.

        A process that has traced some of the stages only, counts the activations of these.
        """
        if self._is_small(model):
            return
        if len(model.traced) < model.plan.num_stages:
            self._check(model, with_own_activations(model, least_memory(model, self.transformation)))
        else:
            traced = [model.traced[stage] for stage in range(model.plan.num_stages)]
            self._check(model, [_parts(rank) for rank in predict_memory(model, self.transformation, traced)])

    def _is_small(self, model: StagedModel) -> bool:
        """Whether everything fits many times over, even if no device shared it: then a prediction is not worth its
        time.
        """
        bound = (2 + self.copies) * _whole(model, self.transformation)
        for stage in model.traced.values():
            of_microbatch = nbytes(stage.residual_vars) + 4 * _size(stage.x) + 2 * _size(stage.state)
            bound += nbytes(stage.prepared_vars) + _size(stage.inputs) + model.plan.num_microbatches * of_microbatch
        known = [free for free in self._free(model.mesh).values() if free is not None]
        free = min(known, default=None)
        return free is not None and MANY_TIMES * model.mesh.devices.size * bound < free

    def _check(self, model: StagedModel, ranks: Sequence[Parts]) -> None:
        copies = {"copies": self.copies * _whole(model, self.transformation)} if self.copies else {}
        needs = (
            self._of_host(model, ranks, copies)
            if on_cpu(model.mesh)
            else needs_of_devices(model.mesh.devices, ranks, copies, self._free(model.mesh))
        )
        worst = max(needs, key=lambda need: need.missing, default=None)
        if worst is not None and worst.missing:
            raise ArgumentError(_explain(model, worst))

    def _of_host(self, model: StagedModel, ranks: Sequence[Parts], copies: Parts) -> Iterable[Need]:
        """All virtual CPU devices of this machine share its memory."""
        (free,) = self._free(model.mesh).values()
        parts = Counter(copies)
        count = 0
        for rank, of_device in enumerate(ranks):
            owners = [device.process_index for device in model.mesh.devices[rank].flat]
            here = sum(owner == jax.process_index() or owner in self.neighbours for owner in owners)
            parts.update({name: here * size for name, size in of_device.items()})
            count += here
        shared = "" if count == 1 else f", which its {count} virtual CPU devices share"
        return [] if free is None else [Need(f"the memory of this machine{shared}", free, parts)]

    def _free(self, mesh: Mesh) -> Free:
        return free_in(mesh) if self.free is None else self.free


def _whole(model: StagedModel, transformation: optax.GradientTransformation) -> int:
    """Bytes of all parameters, state and optimizer state, each counted once."""
    leaves = []
    for stage in model.parameters:
        leaves += [*stage.params.values(), *stage.state.values()]
        leaves += jax.tree.leaves(state_shapes(transformation, stage))
    return _size(leaves)


def _size(leaves: Iterable[Any]) -> int:
    """Bytes of the leaves, however they are split."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def free_in(mesh: Mesh) -> Free:
    """What is free of the memory that the devices of a mesh use: their own, or the host's."""
    return {None: free_memory()} if on_cpu(mesh) else {device: _free_on(device) for device in mesh.devices.flat}


def _free_on(device: Any) -> int | None:
    """Free bytes of a device of this process that says how much it has."""
    stats = device.memory_stats() if device.process_index == jax.process_index() else None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if stats and "bytes_limit" in stats else None


def _parts(memory: RankMemory) -> Parts:
    """The fields that add up to its total."""
    names = ("parameters", "gradients", "optimizer", "batch", "activations", "temporaries")
    return {name: getattr(memory, name) for name in names}


def needs_of_devices(devices: np.ndarray, ranks: Sequence[Parts], copies: Parts, free_of: Free) -> Iterable[Need]:
    """Every device of this process that says how much memory it has."""
    for rank, of_device in enumerate(ranks):
        for device in devices[rank].flat:
            free = free_of[device]
            if free is not None:
                parts = {**of_device, **(copies if device is devices.flat[0] else {})}
                yield Need(f"the memory of {device.platform}:{device.id}", free, parts)


def _explain(model: StagedModel, need: Need) -> str:
    largest, *others = sorted(need.parts, key=need.parts.__getitem__, reverse=True)
    rest = ", ".join(f"{name} {format_bytes(need.parts[name])}" for name in others if need.parts[name])
    also = f" (besides {rest})" if rest else ""
    return (
        f"A run must fit into {need.where}. It needs {format_bytes(need.total)} or more, and "
        f"{format_bytes(need.free)} are free: {format_bytes(need.missing)} are missing. The largest part is {largest}, "
        f"{format_bytes(need.parts[largest])}{also}. {_way_out(model, largest)} `force` runs it all the same."
    )


def _way_out(model: StagedModel, largest: str) -> str:
    shape, config = model.mesh.shape, model.config
    helps = []
    if largest in ("activations", "temporaries"):
        if config.remat != "layer":
            helps.append("`remat` layer")
        helps.append("a smaller `batch_size` or more `num_microbatches`, for smaller microbatches")
    elif largest == "batch":
        helps.append("a smaller `batch_size`")
    elif shape.get(DATA, 1) > 1 and not model.rules.gathered:
        helps.append("`sharding` fully-sharded")
    if on_cpu(model.mesh):
        helps.append("a smaller model, more memory, or accelerators with memory of their own")
    else:
        helps.append("a larger `mesh.pipeline` or `mesh.tensor`" if PIPELINE in shape else "more devices")
    return f"What helps: {'; '.join(helps)}."
