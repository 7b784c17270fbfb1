"""One stage before tracing: its function, its place, and the shapes of what it owns, takes and hands on."""

import enum
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from meshpipe.sharding import Shapes, abstract, activation_sharding
from meshpipe.stage.target import Target


class StageOutput(NamedTuple):
    """What a stage makes of one microbatch."""

    values: tuple[Any, ...]
    """A pytree of arrays for each value that it hands on to other stages."""
    sums: Mapping[str, jax.Array]
    """Scalars to add up over the microbatches of a step, by name. Each stage has names of its own."""
    objective: jax.Array | None
    """What is differentiated besides the values: the part of the loss that this stage has, a sum over the
    microbatch. None where it has none."""
    state: Mapping[str, jax.Array]
    """All of its state afterwards."""


@runtime_checkable
class StageFunction(Protocol):
    """What a stage computes on one microbatch, as a pure function of flat dictionaries.

    `values` has a pytree for each value that the stage is handed. `randomness` is `(seed key data, path hashes, step,
    microbatch)`.
    """

    def __call__(
        self,
        params: dict[str, jax.Array],
        state: dict[str, jax.Array],
        values: tuple[Any, ...],
        batch: dict[str, jax.Array],
        randomness: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> StageOutput: ...


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
    streams: int = 0
    """Number of random streams of its layers. The hash of each stream's path is an input: uint32, `[streams]`."""
    gathered: frozenset[str] = frozenset()
    """Paths of the parameters, trained or frozen, that `data` splits between steps, and that a step gathers at its
    start."""
    has_backward: bool = True
    """Whether it has parameters to train, or a value that it is handed has a gradient. If not, nothing is
    differentiated, and forward stores nothing."""
    gradients_in: tuple[bool, ...] = ()
    """For each value that it is handed, whether it computes the gradient. Those of a stage that is not trained, and
    has nothing trained before it, have none."""
    readers: tuple[int, ...] = ()
    """For each value that it hands on, how many stages compute its gradient; read only where it has a backward."""
    checkpoint_policy: Callable[..., bool] | None = None
    """What `jax.checkpoint` saves of the stage's forward. None stores few bytes (`residuals.py`), `everything_saveable`
    everything that the derivative reads."""
    overwrites_state: bool = False
    """Whether forward is given the buffers of the state that it changes, and updates them in place: nobody reads the
    state before. So a cache of keys and values is never copied."""


class Boundary:
    """The shape of a value that one stage hands to others: any pytree of arrays."""

    def __init__(self, value: Any):
        self.leaves, self.treedef = jax.tree.flatten(value)
        # Gradients of integers have a dtype of their own in JAX (float0), and nothing to move.
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


def on_submesh(boundaries: Sequence[Boundary], mesh: Mesh, microbatch_size: int) -> Shapes:
    """Shapes and shardings of the leaves of all values, one value after the other."""
    return tuple(shape for boundary in boundaries for shape in boundary.on(mesh, microbatch_size))


def unflattened(boundaries: Sequence[Boundary], leaves: Sequence[Any]) -> tuple[Any, ...]:
    """The values, from all of their leaves."""
    rest = iter(leaves)
    return tuple(jax.tree.unflatten(b.treedef, [next(rest) for _ in b.leaves]) for b in boundaries)


def outputs_of(
    spec: StageSpec, boundaries_in: Sequence[Boundary], fields: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[tuple[Boundary, ...], tuple[str, ...]]:
    """What a stage of another process hands on, a boundary for each value, and the names of its sums. Takes the
    arguments of `TracedStage`.

    Only its shape is needed here, so nothing is differentiated: a process traces no more than its own stages.
    """
    values = tuple(jax.tree.unflatten(boundary.treedef, boundary.leaves) for boundary in boundaries_in)
    batch = {name: jax.ShapeDtypeStruct(field.shape[1:], field.dtype) for name, field in fields.items()}
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    scalar = jax.ShapeDtypeStruct((), jnp.uint32)
    randomness = key, jax.ShapeDtypeStruct((spec.streams,), jnp.uint32), scalar, scalar

    def output(*arguments: Any) -> Any:
        values, sums, *_ = spec.function(*arguments)
        return jax.tree.map(jnp.asarray, values), OrderedDict(
            (name, jnp.asarray(total)) for name, total in sums.items()
        )

    with jax.set_mesh(spec.mesh):
        made, sums = jax.eval_shape(output, dict(spec.params), dict(spec.state), values, batch, randomness)
    return tuple(map(Boundary, made)), tuple(sums)
