"""The leaves of a stage: what it owns, where, and how much of it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from meshpipe.layers.after_step import after_step_of
from meshpipe.layers.initialise import placed
from meshpipe.layers.layer import Layer
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.sharding import ShardingRules


@dataclass(frozen=True)
class StageInfo:
    """One stage as a table shows it."""

    index: int
    rank: int
    layers: range
    submesh: Mesh
    parameter_count: int
    parameter_bytes: int
    """Over the whole submesh, each array counted once."""
    trained_count: int
    """Those of its parameters that are trained."""

    @classmethod
    def of(cls, index: int, rank: int, layers: range, owned: StageParameters) -> "StageInfo":
        leaves = owned.all_params.values()
        return cls(
            index=index,
            rank=rank,
            layers=layers,
            submesh=owned.mesh,
            parameter_count=sum(leaf.size for leaf in leaves),
            parameter_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
            trained_count=sum(leaf.size for leaf in owned.params.values()),
        )


def stage_parameters(
    layers: Sequence[Layer], mesh: Mesh, rules: ShardingRules, borrowed: frozenset[str]
) -> StageParameters:
    """What a stage of these layers owns on its submesh; `borrowed` has the parameters that other stages own."""
    params: dict[str, jax.ShapeDtypeStruct] = {}
    state: dict[str, jax.ShapeDtypeStruct] = {}
    for layer in layers:
        of_params, of_state = placed(layer, mesh, rules)
        params.update(of_params)
        state.update(of_state)
    of_others = borrowed.intersection(params)
    frozen = frozenset().union(*(layer.frozen for layer in layers))
    once = after_step_of(layers, of_others)
    return StageParameters(mesh, params, state, of_others, after_step=once, frozen=frozen)


def gathered_leaves(layers: Sequence[Layer], rules: ShardingRules) -> frozenset[str]:
    """The parameters that the data axis splits only between steps."""
    return frozenset(
        path for layer in layers for path in layer.all_params if rules.gathered.intersection(layer.axes.get(path, ()))
    )
