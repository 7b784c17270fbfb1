"""From the logical axes of arrays to the mesh axes inside a stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.mesh import DATA, TENSOR

TENSOR_RULES: Mapping[str, str | None] = MappingProxyType(
    {"heads": TENSOR, "hidden": TENSOR, "vocab": TENSOR, "embed": None}
)
"""Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3): heads, hidden units and vocabulary are split."""


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis each logical axis of a parameter is split over: a strategy changes these, never the model.

    A parameter names its axes with `nnx.with_partitioning(init, ("embed", "heads", None))`. A logical axis without a
    rule may also be a mesh axis itself. A parameter without names is replicated inside its stage.
    """

    rules: Mapping[str, str | None] = field(default_factory=lambda: TENSOR_RULES)
    gathered: frozenset[str] = frozenset()
    """Logical axes that `data` splits between steps alone: a step gathers the parameters at its start, and splits the
    sums of their gradients at its end."""

    def spec(self, axes: Sequence[str | None] | None, mesh: Mesh) -> PartitionSpec:
        """Raises `ValueError` for a name that is neither in the rules nor a mesh axis."""
        if not axes:
            return PartitionSpec()
        return PartitionSpec(*(self._mesh_axis(axis, mesh) for axis in axes))

    def _mesh_axis(self, axis: str | None, mesh: Mesh) -> str | None:
        if axis is None or axis in self.rules:
            return self.rules[axis] if axis is not None else None
        if axis in mesh.axis_names:
            return axis
        raise ValueError(
            f"Every logical axis needs a rule or is a mesh axis. Got {axis!r}, with rules for {', '.join(self.rules)} "
            f"and mesh axes {', '.join(mesh.axis_names)}. Add it to ShardingRules(rules={{..., {axis!r}: None}})."
        )

    def sharding(self, path: str, shape: Sequence[int], axes: Sequence[str | None] | None, mesh: Mesh) -> NamedSharding:
        """Where the leaf lives on the submesh.

        Raises `ValueError` when a split axis does not divide by its mesh axis.
        """
        spec = self.spec(axes, mesh)
        for dim, (size, mesh_axis) in enumerate(zip(shape, spec, strict=False)):
            parts = mesh.shape[mesh_axis] if mesh_axis is not None else 1
            if size % parts:
                raise ValueError(
                    f"A split axis must divide by its mesh axis. {path} has {size} {axes[dim] if axes else ''} in dim "
                    f"{dim}, and the mesh axis {mesh_axis} has {parts} parts. Choose a divisor of {size}."
                )
        return NamedSharding(mesh, spec)


FULLY_SHARDED = ShardingRules({**TENSOR_RULES, "embed": DATA}, gathered=frozenset(["embed"]))
"""The embedding axis of every parameter and of its optimizer state is split over `data` as well (ZeRO, arXiv
1910.02054, section 5)."""

PRESETS: Mapping[str, ShardingRules] = MappingProxyType({"replicated": ShardingRules(), "fully-sharded": FULLY_SHARDED})
"""Rules by the name of what they do on the data axis."""


def without_data(spec: PartitionSpec) -> PartitionSpec:
    """The same, whole on every part of the data axis."""
    return PartitionSpec(*(None if axis == DATA else axis for axis in spec))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def activation_sharding(mesh: Mesh, shape: Sequence[int], microbatch_size: int) -> NamedSharding:
    """A boundary value is split over `data` along its leading dim where that dim is the microbatch; else replicated."""
    if DATA in mesh.axis_names and len(shape) > 0 and shape[0] == microbatch_size:
        return NamedSharding(mesh, PartitionSpec(DATA))
    return replicated(mesh)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For a batch field of shape `(num_microbatches, microbatch_size, ...)`: every microbatch is split over `data`."""
    return NamedSharding(mesh, PartitionSpec(None, DATA) if DATA in mesh.axis_names else PartitionSpec())


def abstract(shape: Sequence[int], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def is_local(mesh: Mesh) -> bool:
    """Whether this process has a device of the mesh."""
    return any(device.process_index == jax.process_index() for device in mesh.devices.flat)


def place(values: Any, shardings: Any) -> Any:
    """Puts a pytree of numpy arrays, which are the same in all processes, onto shardings with local devices."""
    leaves, treedef = jax.tree.flatten(values)
    where = jax.tree.leaves(shardings)
    if all(sharding.is_fully_addressable for sharding in where):
        return jax.tree.unflatten(treedef, jax.device_put(leaves, where))
    # `jax.device_put` onto devices of all processes would compare the values between them.
    return jax.tree.unflatten(treedef, [_place_parts(v, s) for v, s in zip(leaves, where, strict=True)])


def _place_parts(value: Any, sharding: NamedSharding) -> jax.Array:
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index], dtype=whole.dtype)


def scalar_dtype() -> np.dtype:
    """The dtype of the loss, its weight and the norm: float64 with `jax_enable_x64`, else float32."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.float64))


def widened(array: Any) -> np.ndarray:
    """The array in float64, or complex128: NumPy knows neither bfloat16 nor what is finite in it."""
    return np.asarray(array, np.complex128 if jnp.issubdtype(array.dtype, np.complexfloating) else np.float64)


def local_value(array: jax.Array) -> np.ndarray:
    """The value of an array that every device has whole, waiting for it."""
    return np.asarray(array.addressable_shards[0].data)
