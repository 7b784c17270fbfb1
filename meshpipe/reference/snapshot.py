"""What a trainer holds between two updates, copied to one device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meshpipe.trainer import Trainer
from meshpipe.training.state import StateTree

KeyPath = tuple[Any, ...]


class RecordState(NamedTuple):
    """The gradients of the last update, as the optimizer saw them."""

    gradients: Any


def record_gradients() -> optax.GradientTransformation:
    """Passes gradients on and keeps them, so that those compared are those that made the update."""

    def init(params: Any) -> RecordState:
        return RecordState(jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: RecordState, params: Any = None) -> tuple[Any, RecordState]:
        return updates, RecordState(updates)

    return optax.GradientTransformation(init, update)


@dataclass(frozen=True)
class Snapshot:
    """Parameters and state by leaf path, the gradients that the optimizer got, and its own state."""

    params: dict[str, jax.Array]
    state: dict[str, jax.Array]
    gradients: dict[str, jax.Array]
    optimizer: tuple[dict[KeyPath, jax.Array], ...]
    """For every stage, the leaves of Optax's state."""

    def optimizer_state(self, like: Any) -> Any:
        """Optax's state of all parameters at once, in the form of `like`, from the states of the stages."""
        leaves = {key: leaf for stage in reversed(self.optimizer) for key, leaf in stage.items()}
        return jax.tree_util.tree_map_with_path(lambda key, _: leaves[key], like)


def snapshot(trainer: Trainer, device: jax.Device) -> Snapshot:
    """Of a trainer in one process whose optimizer is a chain of `record_gradients` and another."""
    own_trees = trainer.state_tree()
    # Copied after the move, which may hand on the same buffer, and the next step donates that.
    trees: list[StateTree] = jax.tree.map(jnp.copy, jax.device_put(own_trees, device))
    gradients: dict[str, jax.Array] = {}
    optimizer = []
    for own_tree, tree, shapes in zip(own_trees, trees, trainer.optimizer.state_shapes, strict=True):
        # JAX sorts the keys of dictionaries, so the order of Optax's leaves is that of the trainer's own.
        leaves = [tree["optimizer"][path] for path in own_tree["optimizer"]]
        recorded, own = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
        gradients |= recorded.gradients
        optimizer.append(dict(jax.tree_util.tree_flatten_with_path(own)[0]))
    return Snapshot(
        {path: leaf for tree in trees for path, leaf in tree["params"].items()},
        {path: leaf for tree in trees for path, leaf in tree["state"].items()},
        gradients,
        tuple(optimizer),
    )


def overwrite(batch: Mapping[str, np.ndarray]) -> None:
    """Fills arrays with what no batch has, as a loader does that uses its buffers again."""
    for array in batch.values():
        if array.dtype == np.bool_:
            np.logical_not(array, out=array)
        else:
            array.view(np.uint8)[...] = 0xFF
