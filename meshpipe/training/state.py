"""Everything that training changes: parameters, other state such as batch statistics, and the optimizer's state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from meshpipe.errors import ArgumentError
from meshpipe.layers.layer import Leaves
from meshpipe.layers.paths import by_path
from meshpipe.layers.shared import FACTORS
from meshpipe.optimizer.optimizer import Optimizer, Scalars
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.tied import TiedLeaves
from meshpipe.pipeline.executor import Sums
from meshpipe.sharding import Arrays
from meshpipe.stage.traced import replaced

StateTree = dict[str, dict[str, Any]]
"""What a stage owns, by leaf path: `{"params": ..., "state": ..., "optimizer": ...}`."""


@dataclass(frozen=True)
class StartingState:
    """What training starts from in place of first values. The arrays belong to the trainer, which donates them."""

    trees: Sequence[StateTree]
    """On the devices of the stages; without `optimizer`, its state begins anew."""
    step: int
    """The update after which they were so."""

    @property
    def paths(self) -> frozenset[str]:
        """The leaves of the model that it has; the others get first values."""
        return frozenset(path for tree in self.trees for name in ("params", "state") for path in tree.get(name, ()))


class TrainingState:
    """The arrays of the local stages, each on its submesh, which an update donates and replaces.

    `stages` has the shapes of all stages, also of those in other processes. `made` has the initial values of the local
    layers, parameters and other state, that a `start` does not have.
    """

    def __init__(
        self,
        stages: Sequence[StageParameters],
        local: Sequence[int],
        optimizer: Optimizer,
        tied: TiedLeaves,
        frozen_tied: TiedLeaves,
        made: Sequence[tuple[Leaves, Leaves]],
        start: StartingState | None = None,
    ):
        self._stages, self._local, self._optimizer = stages, local, optimizer
        self._tied, self._frozen_tied = tied, frozen_tied
        self._frozen = {s: [i for i, path in enumerate(stages[s].state) if path in stages[s].frozen] for s in local}
        self._optimizer_paths = [
            tuple(by_path(shapes, stage.params)) for stage, shapes in zip(stages, optimizer.state_shapes, strict=True)
        ]
        self.params: dict[int, Arrays] = {}
        """Trained parameters by stage, in the order of the stage's leaves."""
        self.state: dict[int, Arrays] = {}
        """Frozen parameters and other state by stage, in the order of the stage's leaves."""
        self._of_optimizer: dict[int, Any] = {}
        first = {path: leaf for layer in made for leaves in layer for path, leaf in leaves.items()}
        trees = [{} for _ in stages] if start is None else start.trees
        self._take(trees, lambda _, path: first[path], donate=True)

    def update(self, gradients: Mapping[int, Arrays], after: Mapping[int, Arrays], sums: Sums) -> Scalars:
        """Applies one update. `after` is the state that forward produced, which replaces the current state."""
        self.params, self._of_optimizer, self.state, found = self._optimizer.update(
            self.params, self._of_optimizer, self._tied.sum_gradients(gradients), self.state, after, sums
        )
        self.params = self._tied.share_values(self.params)
        return found

    def trees(self, *, frozen: bool = True) -> list[StateTree]:
        """One tree a stage; those of stages that live in other processes are empty. Without `frozen`, parameters that
        are not trained are left out.
        """
        return [
            {
                **_sections(stage, dict(zip(stage.params, self.params[i], strict=True)), self.state[i], frozen),
                "optimizer": self._named(i, self._of_optimizer[i]),
            }
            if i in self.params
            else {"params": {}, "state": {}, "optimizer": {}}
            for i, stage in enumerate(self._stages)
        ]

    def abstract_trees(self, *, optimizer: bool, frozen: bool = True) -> list[StateTree]:
        """Shapes and shardings of all stages; without `optimizer`, of the weights alone, and without `frozen`, of the
        trained ones.
        """
        return [
            _sections(stage, stage.params, tuple(stage.state.values()), frozen)
            | ({"optimizer": self._named(i, self._optimizer.state_shapes[i])} if optimizer else {})
            for i, stage in enumerate(self._stages)
        ]

    def load(self, trees: Sequence[StateTree], *, donate: bool) -> None:
        """Takes the arrays of trees, or copies of them, and waits until they are there.

        Frozen parameters and adapters that the trees lack stay as they are. Raises `ArgumentError` for anything else
        that is not there.
        """
        now = {i: self._values(i) for i in self._local}
        for i in self._local:
            _check_whole(self._stages[i], trees[i])
        self._take(trees, lambda i, path: now[i][path], donate=donate)
        jax.block_until_ready((self.params, self.state, self._of_optimizer))

    def _take(self, trees: Sequence[StateTree], otherwise: Callable[[int, str], jax.Array], *, donate: bool) -> None:
        """Takes the leaves of trees; of the others, values of `otherwise`, by stage and path."""
        take = _as_they_are if donate else _copies
        for i in self._local:
            stage, shapes = self._stages[i], self._optimizer.state_shapes[i]
            given = {**trees[i].get("params", {}), **trees[i].get("state", {})}
            leaves = {**stage.params, **stage.state}
            held = {path: shape for path, shape in leaves.items() if path in given}
            taken = dict(zip(held, take(given, held), strict=True))
            values = {path: taken[path] if path in taken else otherwise(i, path) for path in leaves}
            self.params[i] = tuple(values[path] for path in stage.params)
            self.state[i] = tuple(values[path] for path in stage.state)
            if "optimizer" in trees[i]:
                wanted = dict(zip(self._optimizer_paths[i], jax.tree.leaves(shapes), strict=True))
                _check_optimizer(trees[i]["optimizer"], wanted)
                self._of_optimizer[i] = jax.tree.unflatten(
                    jax.tree.structure(shapes), take(trees[i]["optimizer"], wanted)
                )
        # A checkpoint from before two leaves were tied may hold different values.
        self.params = self._tied.share_values(self.params)
        self._share_frozen()
        if not any("optimizer" in trees[i] for i in self._local):
            self._of_optimizer = self._optimizer.init(self.params)

    def _values(self, stage: int) -> Leaves:
        shapes = self._stages[stage]
        return dict(zip((*shapes.params, *shapes.state), (*self.params[stage], *self.state[stage]), strict=True))

    def _share_frozen(self) -> None:
        """Gives tied frozen parameters the value of their owner."""
        values = {s: tuple(self.state[s][i] for i in places) for s, places in self._frozen.items()}
        for s, shared in self._frozen_tied.share_values(values).items():
            self.state[s] = replaced(self.state[s], self._frozen[s], shared)

    def _named(self, stage: int, opt_state: Any) -> dict[str, Any]:
        """The leaves of a stage's optimizer state by path."""
        return dict(zip(self._optimizer_paths[stage], jax.tree.leaves(opt_state), strict=True))


def _check_optimizer(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises `ArgumentError` unless the state is that of the optimizer and of what is trained."""
    for path in sorted(found.keys() ^ wanted.keys()):
        where = "the trainer's" if path in wanted else "the restored one"
        raise ArgumentError(
            "The restored state of an optimizer must belong to the parameters that are trained. "
            f"Only {where} has {path}. Pass the same optimizer and `trainable`, or restore the weights alone, with "
            "abstract_state_tree(optimizer=False): then the optimizer begins anew."
        )


def _sections(stage: StageParameters, params: Mapping[str, Any], state: Sequence[Any], frozen: bool) -> StateTree:
    """The trees of a stage without the optimizer: frozen parameters are among the parameters, or left out."""
    named = dict(zip(stage.state, state, strict=True))
    return {
        "params": {**params, **({path: named[path] for path in stage.frozen_params} if frozen else {})},
        "state": {path: named[path] for path in stage.own_state},
    }


def _check_whole(stage: StageParameters, tree: StateTree) -> None:
    given = {**tree.get("params", {}), **tree.get("state", {})}
    for path in (*stage.params, *stage.own_state):
        if path not in given and not path.endswith(FACTORS):
            raise ArgumentError(
                f"Restored trees must have every value that is trained, and all other state. They lack {path}. Restore "
                "what `abstract_state_tree` describes."
            )


def _as_they_are(leaves: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    return tuple(leaves[path] for path in wanted)


def _copies(leaves: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> tuple[jax.Array, ...]:
    return tuple(jnp.copy(jax.device_put(leaves[path], shape.sharding)) for path, shape in wanted.items())
