"""What the optimizer knows of a stage."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

ShapesByPath = Mapping[str, jax.ShapeDtypeStruct]
"""The shapes and shardings of a stage's leaves, by leaf path."""


@dataclass(frozen=True)
class StageParameters:
    """What the optimizer knows of a stage: its submesh, parameters and state."""

    mesh: Mesh
    params: ShapesByPath
    state: ShapesByPath
    borrowed: frozenset[str] = frozenset()
    """Tied parameters that another leaf owns: they receive its value after every update."""
    fixed: frozenset[str] = frozenset()
    """State that forward does not change, such as frozen weights and masks; updates do not touch it either."""

    @property
    def owned(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {path: shape for path, shape in self.params.items() if path not in self.borrowed}

    @property
    def changing(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The state that forward changes, such as batch statistics."""
        return {path: shape for path, shape in self.state.items() if path not in self.fixed}
