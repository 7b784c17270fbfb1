"""From the logical axes of arrays to the mesh axes inside a stage."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.mesh import DATA, TENSOR, is_described

Arrays: TypeAlias = tuple[jax.Array, ...]
"""Flat values on one submesh, in the order in which a stage or a boundary lists its leaves."""

Shapes: TypeAlias = tuple[jax.ShapeDtypeStruct, ...]
"""What `Arrays` look like before they exist: shape, dtype and, where it is known, sharding."""

Rule: TypeAlias = str | tuple[str, ...] | None
"""A mesh axis, or several that split one dim together, outermost first; None splits nothing."""

TENSOR_RULES: Mapping[str, Rule] = MappingProxyType({"heads": TENSOR, "hidden": TENSOR, "vocab": TENSOR, "embed": None})
"""Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3): heads, hidden units and vocabulary are split."""


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis splits each logical axis of a parameter: to change the strategy, change the rules, not the model.

    A parameter names the logical axes of its dims: `nnx.with_partitioning(init, ("embed", "heads", None))`. A name may
    also be a mesh axis itself, and then needs no rule. A parameter without names is replicated inside its stage.

    Raises `ValueError` for rules of another type, and for `data` among several axes of one rule.
    """

    rules: Mapping[str, Rule] = field(default_factory=lambda: TENSOR_RULES)
    """The mesh axis for each logical axis; a tuple of mesh axes splits one dim over all of them, outermost first; None
    splits nothing. The size of a dim must divide by its number of parts. The default, `TENSOR_RULES`, splits `heads`,
    `hidden` and `vocab` over `tensor`."""
    gathered: frozenset[str] = frozenset()
    """Logical axes that `data` splits between steps only. A step gathers these parameters once at its start, and
    splits the reduced gradients once at its end. By default none."""

    def __post_init__(self) -> None:
        if not isinstance(self.rules, Mapping):
            raise ValueError(f"`rules` must be a dict of mesh axes by logical axis. Got {self.rules!r}.")
        for logical, rule in self.rules.items():
            parts = rule if isinstance(rule, tuple) else (rule,)
            if not isinstance(logical, str) or not all(isinstance(part, str | None) for part in parts):
                raise ValueError(
                    "A rule gives a logical axis a mesh axis, a tuple of mesh axes, or None. "
                    f"Got {logical!r} -> {rule!r}."
                )
            if len(parts) > 1 and (None in parts or DATA in parts):
                raise ValueError(
                    f"Several mesh axes of one rule must be axes other than {DATA!r}, over which gradients are summed. "
                    f"Got {logical!r} -> {rule!r}. Give {DATA!r} a rule of its own."
                )

    def check(self, names: Iterable[str | None], mesh: Mesh) -> None:
        """Checks the logical axes of parameters against the rules and the mesh of a stage.

        Raises `ValueError` that lists every name without a rule that is no mesh axis either, and any rule that needs an
        axis which the mesh does not have.
        """
        used = [name for name in dict.fromkeys(names) if name is not None]
        foreign = [name for name in used if name not in self.rules and name not in mesh.axis_names]
        if foreign:
            added = ", ".join(f"{name!r}: None" for name in foreign)
            raise ValueError(
                "Every logical axis needs a rule or is a mesh axis. "
                f"Got {', '.join(map(repr, foreign))}, with rules for {', '.join(self.rules)} and mesh axes "
                f"{', '.join(mesh.axis_names)}. Add them: ShardingRules(rules={{..., {added}}})."
            )
        for name in used:
            missing = [axis for axis in _axes(self._rule(name)) if axis not in mesh.axis_names]
            if missing:
                raise ValueError(
                    "A rule must name axes of the mesh that are inside a stage. "
                    f"Got {name!r} -> {self.rules[name]!r}, and a stage has {', '.join(mesh.axis_names) or 'none'}. "
                    "Change the rule, or give the mesh that axis."
                )

    def spec(self, axes: Sequence[str | None] | None, mesh: Mesh) -> PartitionSpec:
        """The partition spec of an array with these logical axes; raises `ValueError` as `check` does."""
        self.check(axes or (), mesh)
        return PartitionSpec(*(self._rule(axis) for axis in axes or ()))

    def _rule(self, axis: str | None) -> Rule:
        if axis is None or axis not in self.rules:
            return axis
        rule = self.rules[axis]
        return rule[0] if isinstance(rule, tuple) and len(rule) == 1 else rule

    def sharding(self, path: str, shape: Sequence[int], axes: Sequence[str | None] | None, mesh: Mesh) -> NamedSharding:
        """How the leaf `path` is laid out on a submesh.

        Of a leaf that `data` splits between steps only, it splits the first dim, where that divides, whichever dim has
        the name: each device then has rows that lie together, and GPUs gather and reduce them without transposes.

        Raises `ValueError` when a split axis does not divide by its mesh axis.
        """
        spec = self.spec(axes, mesh)
        if len(spec) > len(shape):
            raise ValueError(
                f"A leaf must have as many dims as logical axes. {path} has the shape {tuple(shape)} and the axes "
                f"{axes}. Name one axis for each dim."
            )
        for dim, (size, rule) in enumerate(zip(shape, spec, strict=False)):
            parts = math.prod(mesh.shape[axis] for axis in _axes(rule))
            if size % parts:
                mesh_axis = " * ".join(_axes(rule))
                raise ValueError(
                    f"A split axis must divide by its mesh axis. {path} has {size} {axes[dim] if axes else ''} in dim "
                    f"{dim}, and the mesh axis {mesh_axis} has {parts} parts. Choose a divisor of {size}."
                )
        if self.gathered.intersection(axes or ()) and DATA in spec[1:]:
            first = *_axes(spec[0]), DATA
            if shape[0] % math.prod(mesh.shape[axis] for axis in first) == 0:
                spec = PartitionSpec(first if len(first) > 1 else DATA, *without_data(spec)[1:])
        return NamedSharding(mesh, spec)


def _axes(rule: Rule) -> tuple[str, ...]:
    return rule if isinstance(rule, tuple) else () if rule is None else (rule,)


FULLY_SHARDED = ShardingRules({**TENSOR_RULES, "embed": DATA}, gathered=frozenset(["embed"]))
"""Splits the embedding axis of every parameter, and of its optimizer state, over `data` as well (ZeRO, arXiv
1910.02054, section 5)."""

PRESETS: Mapping[str, ShardingRules] = MappingProxyType({"replicated": ShardingRules(), "fully-sharded": FULLY_SHARDED})
"""Rules by the name that `--sharding` takes: what they do on the data axis."""


def without_data(spec: PartitionSpec) -> PartitionSpec:
    """The same spec, replicated over the data axis."""
    kept = (tuple(axis for axis in _axes(rule) if axis != DATA) for rule in spec)
    return PartitionSpec(*(axes if len(axes) > 1 else axes[0] if axes else None for axes in kept))


def is_over_data(spec: PartitionSpec) -> bool:
    """Whether the data axis splits a dim."""
    return any(DATA in _axes(rule) for rule in spec)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def splits_microbatch(mesh: Mesh, microbatch_size: int) -> bool:
    """Whether microbatches of this size are split over `data`.

    Those of training always divide by it. One that does not, such as the rest of held-out data, is replicated: every
    part of `data` computes all of it.
    """
    return DATA in mesh.axis_names and microbatch_size % mesh.shape[DATA] == 0


def activation_sharding(mesh: Mesh, shape: Sequence[int], microbatch_size: int) -> NamedSharding:
    """A boundary value is split over `data` along its leading dim where that dim is the microbatch; else replicated."""
    if splits_microbatch(mesh, microbatch_size) and len(shape) > 0 and shape[0] == microbatch_size:
        return NamedSharding(mesh, PartitionSpec(DATA))
    return replicated(mesh)


def batch_sharding(mesh: Mesh, microbatch_size: int) -> NamedSharding:
    """Splits every microbatch over `data`, for a batch field of shape `(num_microbatches, microbatch_size, ...)`."""
    return (
        NamedSharding(mesh, PartitionSpec(None, DATA)) if splits_microbatch(mesh, microbatch_size) else replicated(mesh)
    )


def abstract(shape: Sequence[int], dtype: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


def is_local(mesh: Mesh) -> bool:
    """Whether this process has a device of the mesh, or all of them are only described."""
    return is_described(mesh) or any(device.process_index == jax.process_index() for device in mesh.devices.flat)


def place(values: Any, shardings: Any) -> Any:
    """Puts a pytree of NumPy arrays onto its shardings; the arrays must be the same in all processes."""
    leaves, treedef = jax.tree.flatten(values)
    where = jax.tree.leaves(shardings)
    if all(sharding.is_fully_addressable for sharding in where):
        return jax.tree.unflatten(treedef, jax.device_put(leaves, where))
    # Onto devices of several processes, `jax.device_put` would first compare the values between all of them.
    return jax.tree.unflatten(treedef, [_place_parts(v, s) for v, s in zip(leaves, where, strict=True)])


def _place_parts(value: Any, sharding: NamedSharding) -> jax.Array:
    whole = np.asarray(value)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index], dtype=whole.dtype)


def scalar_dtype() -> np.dtype:
    """The dtype of the loss, its weight and the norm: float64 with `jax_enable_x64`, else float32."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.float64))


def widened(array: Any) -> np.ndarray:
    """The array in float64, or complex128: NumPy has no `isfinite` for bfloat16."""
    return np.asarray(array, np.complex128 if jnp.issubdtype(array.dtype, np.complexfloating) else np.float64)


def local_value(array: jax.Array) -> np.ndarray:
    """The value of a replicated array; waits for it."""
    return np.asarray(array.addressable_shards[0].data)
