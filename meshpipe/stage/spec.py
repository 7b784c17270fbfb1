"""One stage before tracing: its function, its place, and the shapes of what it owns, takes and hands on."""

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from meshpipe.sharding import Shapes, abstract, activation_sharding
from meshpipe.stage.target import Target


@runtime_checkable
class StageFunction(Protocol):
    """What a stage computes on one microbatch, as a pure function of flat dictionaries.

    It returns its output and the new state. The output of the last stage is a tuple of scalars to accumulate over the
    microbatches, `(sum of losses, weight, ...)`; the first of them is differentiated. `randomness` is `(seed key data,
    path hashes, step, microbatch)`.
    """

    def __call__(
        self,
        params: dict[str, jax.Array],
        state: dict[str, jax.Array],
        activation: Any,
        batch: dict[str, jax.Array],
        randomness: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[Any, dict[str, jax.Array]]: ...


class Given(enum.Enum):
    """Inputs of a stage besides the batch fields. Field names are strings, so no field can have the name of one of
    these.
    """

    SEED = "seed"
    PATHS = "paths"
    """Hashes of the paths of the random streams. As an input, they let stages that differ only in paths share a
    trace."""
    STEP = "step"


@dataclass(frozen=True)
class StageSpec:
    """One stage before tracing: its function, its place, and the shapes and shardings of what it owns."""

    index: int
    mesh: Mesh
    """Its submesh."""
    target: Target
    """The platform that its programs are written for."""
    function: StageFunction
    params: Mapping[str, jax.ShapeDtypeStruct]
    state: Mapping[str, jax.ShapeDtypeStruct]
    is_first: bool
    is_last: bool
    streams: int = 0
    """Number of random streams of its layers. The hash of each stream's path is an input: uint32, `[streams]`."""
    gathered: frozenset[str] = frozenset()
    """Paths of the parameters that `data` splits between steps, and that a step gathers at its start."""
    checkpoint_policy: Callable[..., bool] | None = None
    """What `jax.checkpoint` saves of the stage's forward. None stores few bytes (`residuals.py`), `everything_saveable`
    everything that the derivative reads."""


class Boundary:
    """The shape of the value that one stage hands to the next: any pytree of arrays."""

    def __init__(self, value: Any):
        self.leaves, self.treedef = jax.tree.flatten(value)
        self.differentiable = tuple(i for i, leaf in enumerate(self.leaves) if jnp.issubdtype(leaf.dtype, jnp.inexact))

    @property
    def kind(self) -> Hashable:
        """A key that is equal for boundaries between which a stage cannot tell any difference."""
        # Tree definitions may compare equal although their static attributes print differently, e.g. True and 1.
        return self.treedef, repr(self.treedef), tuple((leaf.shape, leaf.dtype) for leaf in self.leaves)

    def on(self, mesh: Mesh, microbatch_size: int) -> Shapes:
        """Shapes and shardings of its leaves on a submesh."""
        return tuple(
            abstract(v.shape, v.dtype, activation_sharding(mesh, v.shape, microbatch_size)) for v in self.leaves
        )

    def gradients_on(self, mesh: Mesh, microbatch_size: int) -> Shapes:
        """Shapes and shardings of the gradients of its floating-point leaves on a submesh."""
        leaves = self.on(mesh, microbatch_size)
        return tuple(leaves[i] for i in self.differentiable)


def boundary_after(
    spec: StageSpec, boundary_in: Boundary | None, fields: Mapping[str, jax.ShapeDtypeStruct]
) -> Boundary:
    """What a stage of another process hands on. Takes the arguments of `TracedStage`.

    Only its shape is needed here, so nothing is differentiated: a process traces no more than its own stages.
    """
    activation = None if boundary_in is None else jax.tree.unflatten(boundary_in.treedef, boundary_in.leaves)
    batch = {name: jax.ShapeDtypeStruct(field.shape[1:], field.dtype) for name, field in fields.items()}
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    scalar = jax.ShapeDtypeStruct((), jnp.uint32)
    randomness = key, jax.ShapeDtypeStruct((spec.streams,), jnp.uint32), scalar, scalar

    def output(*arguments: Any) -> Any:
        return jax.tree.map(jnp.asarray, spec.function(*arguments)[0])

    with jax.set_mesh(spec.mesh):
        shapes = jax.eval_shape(output, dict(spec.params), dict(spec.state), activation, batch, randomness)
    return Boundary(shapes)
