"""What the optimizer knows of a stage."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

ShapesByPath = Mapping[str, jax.ShapeDtypeStruct]
"""The shapes and shardings of a stage's leaves, by leaf path."""


@dataclass(frozen=True)
class AfterStep:
    """What a stage computes once per step, from its updated parameters and the state after the last microbatch."""

    run: Callable[[Mapping[str, jax.Array], Mapping[str, jax.Array]], dict[str, jax.Array]]
    """Parameters and state, as far as `reads` names them -> the state that it writes."""
    reads: frozenset[str]
    """Leaf paths; those that it writes are among them."""
    writes: frozenset[str]
    kind: Hashable
    """A key that is equal for stages that compute the same, whatever the paths of their leaves."""


@dataclass(frozen=True)
class StageParameters:
    """What the optimizer knows of a stage: its submesh, parameters and state."""

    mesh: Mesh
    params: ShapesByPath
    """The parameters that are trained."""
    state: ShapesByPath
    """Its other values: what forward may change, and frozen parameters."""
    borrowed: frozenset[str] = frozenset()
    """Tied parameters that another leaf owns: they receive its value after every update."""
    fixed: frozenset[str] = frozenset()
    """State that a step does not change, such as frozen weights and masks; updates do not touch it."""
    frozen: frozenset[str] = frozenset()
    """The leaves of `state` that are parameters which are not trained."""
    after_step: AfterStep | None = None
    sums: tuple[str, ...] = ()
    """What it adds up over the microbatches of a step besides the loss and its weight (`sums.py`)."""

    @property
    def all_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The parameters, trained or not."""
        return {**self.params, **self.frozen_params}

    @property
    def frozen_params(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: shape for path, shape in self.state.items() if path in self.frozen}

    @property
    def own_state(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The values that are no parameters."""
        return {path: shape for path, shape in self.state.items() if path not in self.frozen}

    @property
    def owned(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: shape for path, shape in self.params.items() if path not in self.borrowed}

    @property
    def changing(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The state that a step changes, such as batch statistics."""
        return {path: shape for path, shape in self.state.items() if path not in self.fixed}

    @property
    def read_after_step(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The state that a step does not change, and `after_step` reads."""
        reads = frozenset[str]() if self.after_step is None else self.after_step.reads
        return {path: shape for path, shape in self.state.items() if path in self.fixed and path in reads}
