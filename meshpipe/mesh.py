"""The named device mesh, and the submesh of each pipeline rank.

JAX is imported by what needs it: the help of commands needs the sizes of a mesh alone.
"""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshpipe.accelerators import quiet_libtpu
from meshpipe.errors import check_whole

if TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

PIPELINE = "pipeline"
DATA = "data"
TENSOR = "tensor"
AXES = (PIPELINE, DATA, TENSOR)
"""Mesh axes, outermost first: neighbours on the tensor axis are neighbouring devices, pipeline ranks are far apart."""

MAX_CPU_DEVICES = 4096
"""The most virtual devices of one process: XLA starts threads for each."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of devices used."""

    pipeline: int = 1
    """Number of pipeline ranks. Each holds different stages on a submesh of its own; 1 is no pipeline."""
    data: int = 1
    """Number of parts into which every microbatch is split inside a stage; 1 splits nothing."""
    tensor: int = 1
    """Number of parts into which heads, hidden units and vocabulary are split inside a stage; 1 splits nothing."""

    def __post_init__(self) -> None:
        for axis in AXES:
            check_whole(axis, getattr(self, axis), section="mesh")

    @property
    def num_devices(self) -> int:
        return self.pipeline * self.data * self.tensor

    def build(self, devices: "Sequence[jax.Device] | None" = None) -> "Mesh":
        """The mesh of these sizes, as `make_mesh` makes it."""
        return make_mesh(self.pipeline, self.data, self.tensor, devices=devices)


def make_mesh(
    pipeline: int = 1, data: int = 1, tensor: int = 1, *, devices: "Sequence[jax.Device] | None" = None
) -> "Mesh":
    """A mesh with the axes `pipeline`, `data` and `tensor`, of type `AxisType.Auto`.

    Tensor is innermost and pipeline outermost, so the axis that communicates most has adjacent devices. With `Auto`
    axes, layers need no sharding calls: XLA places the collectives.

    Arguments:
        pipeline: Number of pipeline ranks. Each holds different stages on a submesh of its own.
        data: Number of parts into which every microbatch is split. Parameters are replicated over them, unless the
            `ShardingRules` say otherwise, and gradients are all-reduced once per step.
        tensor: Number of parts into which the axes `heads`, `hidden` and `vocab` of parameters are split.
        devices: The devices to use, in mesh order; the first `pipeline * data * tensor` of them are taken. None takes
            those of `jax.devices()`.

    Raises `ValueError` when a size is below 1, or there are fewer devices than the product.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    sizes = MeshConfig(pipeline=pipeline, data=data, tensor=tensor)
    if devices is None:
        devices = jax.devices()
    if len(devices) < sizes.num_devices:
        raise ValueError(
            "pipeline * data * tensor must not exceed the number of devices. "
            f"Got {pipeline} * {data} * {tensor} = {sizes.num_devices}, with {len(devices)} {devices[0].platform} "
            f"device{'' if len(devices) == 1 else 's'}.{_way_out(devices[0].platform, sizes.num_devices)}"
        )
    grid = np.asarray(devices[: sizes.num_devices], dtype=object).reshape(pipeline, data, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _way_out(platform: str, needed: int) -> str:
    if platform == "cpu":
        return f" {_restart()}Call meshpipe.use_cpu_devices({needed}) before anything else uses JAX."
    return " Choose smaller axes, or add devices."


def submeshes(mesh: "Mesh") -> "tuple[Mesh, ...]":
    """One mesh of the remaining axes per pipeline rank, in rank order.

    Raises `ValueError` when the first axis of the mesh is not `pipeline`, or an axis is not `AxisType.Auto`.
    """
    from jax.sharding import AxisType, Mesh

    if not mesh.axis_names or mesh.axis_names[0] != PIPELINE:
        raise ValueError(
            f"The first mesh axis must be {PIPELINE!r}. Got axes {mesh.axis_names}. Use meshpipe.make_mesh."
        )
    others = {name: kind for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Auto}
    if others:
        got = ", ".join(f"{name} {kind.name}" for name, kind in others.items())
        raise ValueError(
            "Every mesh axis must be AxisType.Auto, since XLA places what layers compute inside a stage. "
            f"Got {got}, as jax.make_mesh makes them unless told otherwise. Use meshpipe.make_mesh, or pass "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}; layers then call without out_sharding."
        )
    names = mesh.axis_names[1:]
    return tuple(Mesh(row, names, axis_types=(AxisType.Auto,) * len(names)) for row in mesh.devices)


def on_cpu(mesh: "Mesh") -> bool:
    """Whether the devices are virtual CPU devices, which share cores and memory and call for other programs."""
    return bool(mesh.devices.flat[0].platform == "cpu")


def is_described(mesh: "Mesh") -> bool:
    """Whether the devices are only described: programs can be compiled for them, and nothing can run there."""
    return is_described_device(mesh.devices.flat[0])


def is_described_device(device: "jax.Device") -> bool:
    """The same of one device."""
    return getattr(device.client, "runtime_type", None) == "compile_only_runtime"


def use_cpu_devices(count: int) -> None:
    """Gives the CPU backend virtual devices; has no effect on accelerators. Call it before JAX is first used.

    Arguments:
        count: Number of virtual devices, 1 to 4096.

    Raises `ValueError` when JAX has already started with fewer CPU devices, or `count` is out of range.
    """
    import jax

    check_whole("count", count)
    if count > MAX_CPU_DEVICES:
        raise ValueError(
            f"A machine can have at most {MAX_CPU_DEVICES} virtual CPU devices. Got {count:,}. Choose a smaller mesh."
        )
    quiet_libtpu()
    if count > 1:
        # XLA sizes its thread pool by NPROC. In jax 0.10, programs with collectives can deadlock on CPU devices when
        # the pool has fewer than two threads per device. A value that the caller has set stays.
        os.environ.setdefault("NPROC", str(max(2 * count, os.cpu_count() or 1)))
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        started = len(jax.devices("cpu"))
        if started < count:
            raise ValueError(
                f"The number of CPU devices is fixed once JAX has started. Got {count}, with {started} started. "
                f"{_restart()}Call meshpipe.use_cpu_devices before anything else uses JAX."
            ) from None


def _restart() -> str:
    """In a notebook or an IPython shell, where JAX may have started in any cell, how to begin again."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None:
        return ""
    return "Restart the kernel. " if hasattr(shell, "kernel") else "Restart IPython. "


def describe(mesh: "Mesh") -> str:
    """The sizes of the axes in words, e.g. `pipeline 2 x data 2 x tensor 1 = 4 cpu devices`."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    count = math.prod(mesh.shape.values())
    return f"{sizes} = {count} {mesh.devices.flat[0].platform} device{'s' if count > 1 else ''}"
