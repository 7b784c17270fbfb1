"""Shared parameters of several stages, such as the embedding and the head of a language model."""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from meshpipe.optimizer.parameters import StageParameters
from meshpipe.pipeline.transfer import transfer_between
from meshpipe.sharding import Arrays, abstract, is_local


class TiedLeaves:
    """Groups of leaf paths that are one shared parameter.

    The first path of a group owns it. Its gradient is the sum over the group, only it is updated and counted in the
    norm, and the others receive its new value. `name` is the prefix of the names of its transfers.

    Raises `ValueError` for a path that does not exist, is named twice, or has another shape than its owner.
    """

    def __init__(self, groups: Sequence[Sequence[str]], stages: Sequence[StageParameters], name: str = "tied"):
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
        self._pairs: list[_Pair] = []
        for group in groups:
            for path in group[1:]:
                self._pairs.append(_Pair(f"{name} {path}", where[group[0]], where[path], stages))
        self._add = jax.jit(jnp.add, donate_argnums=0)

    def sum_gradients(self, gradients: Mapping[int, Arrays]) -> dict[int, Arrays]:
        """Adds the gradient of every borrowed leaf to that of its owner, in the order of the groups.

        Takes and returns values by local stage. If owner and borrower are in two processes, both must call it.
        """
        result = {s: list(leaves) for s, leaves in gradients.items()}
        for pair in self._pairs:
            (s, i), (other, j) = pair.owner, pair.borrower
            moved = pair.move_gradient(result[other][j] if other in result else None)
            if s in result:
                assert moved is not None
                result[s][i] = self._add(result[s][i], moved)
        return {s: tuple(leaves) for s, leaves in result.items()}

    def share_values(self, params: Mapping[int, Arrays]) -> dict[int, Arrays]:
        """Gives every borrowed leaf a copy of its owner's value, so both stay equal to the bit."""
        result = {s: list(leaves) for s, leaves in params.items()}
        for pair in self._pairs:
            (s, i), (other, j) = pair.owner, pair.borrower
            moved = pair.move_value(result[s][i] if s in result else None)
            if other in result:
                assert moved is not None
                result[other][j] = moved
        return {s: tuple(leaves) for s, leaves in result.items()}


class _Pair:
    """A borrowed leaf and its owner, each as stage and number of the parameter."""

    def __init__(self, name: str, owner: tuple[int, int], borrower: tuple[int, int], stages: Sequence[StageParameters]):
        self.owner, self.borrower = owner, borrower
        owned = list(stages[owner[0]].params.values())[owner[1]]
        borrowed = list(stages[borrower[0]].params.values())[borrower[1]]
        dtype = jnp.promote_types(owned.dtype, jnp.float32)
        gradient = abstract(owned.shape, dtype, owned.sharding)
        self.move_gradient = _move(f"{name} gradient", stages[borrower[0]].mesh, gradient, donated=False)
        self.move_value = _move(f"{name} value", stages[owner[0]].mesh, borrowed, donated=True)


def _move(
    name: str, source: Mesh, target: jax.ShapeDtypeStruct, *, donated: bool
) -> Callable[[jax.Array | None], jax.Array | None]:
    """Moves a leaf, or a copy of one that is donated soon after."""
    assert isinstance(target.sharding, NamedSharding)
    if not is_local(source) and not is_local(target.sharding.mesh):  # type: ignore[arg-type]
        return lambda leaf: None
    if jax.process_count() == 1:
        sharding = target.sharding
        return lambda leaf: jnp.copy(jax.device_put(leaf, sharding)) if donated else jax.device_put(leaf, sharding)
    # Between processes, a leaf must have the same layout on the source as on the target.
    copy = jax.jit(jnp.copy, out_shardings=NamedSharding(source, target.sharding.spec))
    between = transfer_between(name, source, (target,))

    def move(leaf: jax.Array | None) -> jax.Array | None:
        moved = between(None if leaf is None else (copy(leaf),))
        return None if moved is None else moved[0]

    return move


def borrowed(groups: Sequence[Sequence[str]]) -> frozenset[str]:
    """The leaves that another one owns."""
    return frozenset(path for group in groups for path in group[1:])
