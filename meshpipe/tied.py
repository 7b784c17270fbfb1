"""Parameters that are one although several stages use them, such as the embedding and the head of a language model."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from meshpipe.optimizer import StageParameters

Arrays = tuple[jax.Array, ...]


class TiedLeaves:
    """Groups of leaf paths that are one parameter.

    The first of a group owns it: its gradient is the sum over the group, only it is updated and counted in the norm,
    and the others receive its new value.

    Raises `ValueError` for a path that does not exist, is named twice, or has another shape than its owner.
    """

    def __init__(self, groups: Sequence[Sequence[str]], stages: Sequence[StageParameters]):
        where = {path: (s, i) for s, stage in enumerate(stages) for i, path in enumerate(stage.params)}
        shapes = {path: leaf for stage in stages for path, leaf in stage.params.items()}
        named = [path for group in groups for path in group]
        for path in named:
            if path not in where:
                raise ValueError(
                    f"A tied leaf must be a parameter. Got {path!r}; parameters are {', '.join(list(where)[:8])}, ..."
                )
            if named.count(path) > 1:
                raise ValueError(
                    f"A leaf can be tied once. Got {path!r} {named.count(path)} times; put it in one group."
                )
        for owner, *others in groups:
            for path in others:
                if (shapes[path].shape, shapes[path].dtype) != (shapes[owner].shape, shapes[owner].dtype):
                    raise ValueError(
                        f"Tied leaves must have the same shape and dtype. Got {owner} {shapes[owner].shape} and "
                        f"{path} {shapes[path].shape}."
                    )
        self._pairs = [(where[group[0]], where[path]) for group in groups for path in group[1:]]
        self._shardings = [[leaf.sharding for leaf in stage.params.values()] for stage in stages]
        self._add = jax.jit(jnp.add, donate_argnums=0)

    def sum_gradients(self, gradients: Sequence[Arrays]) -> list[Arrays]:
        """Adds every borrowed leaf's gradient to its owner's, in the order of the groups; the borrowed stays."""
        result = [list(leaves) for leaves in gradients]
        for (s, i), (other, j) in self._pairs:
            moved = jax.device_put(result[other][j], self._shardings[s][i])
            result[s][i] = self._add(result[s][i], moved)
        return [tuple(leaves) for leaves in result]

    def share_values(self, params: Sequence[Arrays]) -> list[Arrays]:
        """Gives every borrowed leaf a copy of its owner's value, so that they stay the same to the bit."""
        result = [list(leaves) for leaves in params]
        for (s, i), (other, j) in self._pairs:
            result[other][j] = jnp.copy(jax.device_put(result[s][i], self._shardings[other][j]))
        return [tuple(leaves) for leaves in result]


def borrowed(groups: Sequence[Sequence[str]]) -> frozenset[str]:
    """The leaves that another one owns."""
    return frozenset(path for group in groups for path in group[1:])
