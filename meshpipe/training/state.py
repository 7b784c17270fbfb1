"""Everything that training changes: parameters, other state such as batch statistics, and the optimizer's state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from meshpipe.layers.layer import Leaves
from meshpipe.layers.paths import by_path
from meshpipe.optimizer.optimizer import Optimizer, Scalars
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.tied import TiedLeaves
from meshpipe.pipeline.executor import Sums
from meshpipe.sharding import Arrays

StateTree = dict[str, dict[str, Any]]
"""What a stage owns, by leaf path: `{"params": ..., "state": ..., "optimizer": ...}`."""


@dataclass(frozen=True)
class StartingState:
    """What training starts from in place of first values. The arrays belong to the trainer, which donates them."""

    trees: Sequence[StateTree]
    """On the devices of the stages; without `optimizer`, its state begins anew."""
    step: int
    """The update after which they were so."""


class TrainingState:
    """The arrays of the local stages, each on its submesh, which an update donates and replaces.

    `stages` has the shapes of all stages, also of those in other processes. `made` has the initial values of the local
    layers, parameters and other state; with a `start` they are not read.
    """

    def __init__(
        self,
        stages: Sequence[StageParameters],
        local: Sequence[int],
        optimizer: Optimizer,
        tied: TiedLeaves,
        made: Sequence[tuple[Leaves, Leaves]],
        start: StartingState | None = None,
    ):
        self._stages, self._local, self._optimizer, self._tied = stages, local, optimizer, tied
        self._optimizer_paths = [
            tuple(by_path(shapes, stage.params)) for stage, shapes in zip(stages, optimizer.state_shapes, strict=True)
        ]
        self.params: dict[int, Arrays] = {}
        """Parameters by stage, in the order of the stage's leaves."""
        self.state: dict[int, Arrays] = {}
        self._of_optimizer: dict[int, Any] = {}
        if start is None:
            self._begin(made)
        else:
            self.load(start.trees, donate=True)

    def _begin(self, made: Sequence[tuple[Leaves, Leaves]]) -> None:
        params = {path: leaf for layer, _ in made for path, leaf in layer.items()}
        state = {path: leaf for _, layer in made for path, leaf in layer.items()}
        stages, local = self._stages, self._local
        self.params = self._tied.share_values({s: tuple(params[path] for path in stages[s].params) for s in local})
        self.state = {s: tuple(state[path] for path in stages[s].state) for s in local}
        self._of_optimizer = self._optimizer.init(self.params)

    def update(self, gradients: Mapping[int, Arrays], after: Mapping[int, Arrays], sums: Sums) -> Scalars:
        """Applies one update. `after` is the state that forward produced, which replaces the current state."""
        self.params, self._of_optimizer, self.state, found = self._optimizer.update(
            self.params, self._of_optimizer, self._tied.sum_gradients(gradients), self.state, after, sums
        )
        self.params = self._tied.share_values(self.params)
        return found

    def trees(self) -> list[StateTree]:
        """One tree a stage; those of stages that live in other processes are empty."""
        return [
            {
                "params": dict(zip(stage.params, self.params[i], strict=True)),
                "state": dict(zip(stage.state, self.state[i], strict=True)),
                "optimizer": self._named(i, self._of_optimizer[i]),
            }
            if i in self.params
            else {"params": {}, "state": {}, "optimizer": {}}
            for i, stage in enumerate(self._stages)
        ]

    def abstract_trees(self, *, optimizer: bool) -> list[StateTree]:
        """Shapes and shardings of all stages; without `optimizer`, of the weights alone."""
        return [
            {"params": dict(stage.params), "state": dict(stage.state)}
            | ({"optimizer": self._named(i, self._optimizer.state_shapes[i])} if optimizer else {})
            for i, stage in enumerate(self._stages)
        ]

    def load(self, trees: Sequence[StateTree], *, donate: bool) -> None:
        """Takes the arrays of trees, or copies of them, and waits until they are there."""
        for i in self._local:
            tree, stage, shapes = trees[i], self._stages[i], self._optimizer.state_shapes[i]
            wanted = dict(zip(self._optimizer_paths[i], jax.tree.leaves(shapes), strict=True))
            take = _as_they_are if donate else _copies
            self.params[i] = take(tree["params"], stage.params)
            self.state[i] = take(tree["state"], stage.state)
            if "optimizer" in tree:
                self._of_optimizer[i] = jax.tree.unflatten(jax.tree.structure(shapes), take(tree["optimizer"], wanted))
        # A checkpoint from before two leaves were tied may hold different values.
        self.params = self._tied.share_values(self.params)
        if not any("optimizer" in trees[i] for i in self._local):
            self._of_optimizer = self._optimizer.init(self.params)
        jax.block_until_ready((self.params, self.state, self._of_optimizer))

    def _named(self, stage: int, opt_state: Any) -> dict[str, Any]:
        """The leaves of a stage's optimizer state by path."""
        return dict(zip(self._optimizer_paths[stage], jax.tree.leaves(opt_state), strict=True))


def _as_they_are(leaves: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    return tuple(leaves[path] for path in wanted)


def _copies(leaves: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    return tuple(jnp.copy(jax.device_put(leaves[path], shape.sharding)) for path, shape in wanted.items())
