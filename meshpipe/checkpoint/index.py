"""Which leaves a checkpoint holds, and whether they are those that are asked for."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meshpipe.checkpoint.chunks import LARGEST_CHUNK, chunk_shape
from meshpipe.checkpoint.errors import CheckpointError
from meshpipe.checkpoint.names import MAX_NAME, name_problem

Tree = Mapping[str, Mapping[str, Any]]
"""What one stage saves: sections such as `params`, each a flat dict of arrays by leaf path."""
Index = dict[str, dict[str, Any]]
"""For each leaf, `section/path`: its item, shape, dtype, and `chunks`, the shape of the part in each of its files."""
Items = dict[str, dict[str, jax.Array]]
"""For each item, `stage_0` and so on, its arrays by leaf."""


WEIGHTS = ("params/", "state/")
"""How the keys of leaves begin that make up a model."""


def index_leaves(
    trees: Sequence[Tree] | None, shapes: Sequence[Tree] | None = None, longest_name: int = MAX_NAME
) -> tuple[Index, Items]:
    """Where each leaf is to be found, and the arrays of each item; a leaf that several stages own is saved by the
    first.

    `shapes` has all leaves where some are only in other processes, and therefore not in `trees`. Without trees there
    are no arrays yet. Raises `CheckpointError` for what cannot be saved.
    """
    index: Index = {}
    items: Items = {}
    layouts: dict[tuple[Any, ...], dict[str, Any]] = {}
    every = trees if shapes is None else shapes
    assert every is not None
    for stage, tree in enumerate(every):
        item = f"stage_{stage}"
        for section, leaves in tree.items():
            for path, shape in leaves.items():
                key = f"{section}/{path}"
                leaf = None
                if trees is not None:
                    leaf = shape if shapes is None else trees[stage].get(section, {}).get(path)
                    if leaf is not None or shape.sharding.addressable_devices:
                        _check_array(key, leaf)
                first = index.get(key)
                if first is None:
                    _check_name(key, longest_name)
                    layout = (shape.shape, shape.dtype, getattr(shape, "sharding", None))
                    if layout not in layouts:  # many leaves have the same, and the loop waits for this
                        layouts[layout] = _entry(key, shape)
                    index[key] = {"item": item, **layouts[layout]}
                    if leaf is not None and leaf.size:
                        items.setdefault(item, {})[key] = leaf
                elif (first["shape"], first["dtype"]) != (list(shape.shape), str(shape.dtype)):
                    raise CheckpointError(
                        f"A leaf that several stages own must be the same in each. {key} is "
                        f"{first['dtype']}{first['shape']} in {first['item']}, and "
                        f"{shape.dtype}{list(shape.shape)} in {item}. Give them paths of their own."
                    )
    return index, items


def index_bytes(index: Mapping[str, Mapping[str, Any]]) -> int:
    """Bytes of all leaves."""
    return sum(math.prod(leaf["shape"]) * jax.numpy.dtype(leaf["dtype"]).itemsize for leaf in index.values())


def tree_bytes(shapes: Sequence[Tree]) -> int:
    """Bytes of the arrays of trees like these, in a checkpoint."""
    return index_bytes(index_leaves(None, shapes)[0])


def _check_name(key: str, longest_name: int) -> None:
    problem = name_problem(key, longest_name)
    if problem:
        raise CheckpointError(f"A leaf's path {problem}. Got {key!r}. Rename the attributes that it is made of.")


def _entry(key: str, shape: Any) -> dict[str, Any]:
    """What the index says of a leaf, without its item."""
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        raise CheckpointError(f"A leaf must be plain numbers. {key} is a typed key. Save jax.random.key_data of it.")
    sharding = getattr(shape, "sharding", None)
    shard = shape.shape if sharding is None else sharding.shard_shape(tuple(shape.shape))
    chunks = chunk_shape(shape.shape, shard, np.dtype(shape.dtype).itemsize, LARGEST_CHUNK)
    return {"shape": list(shape.shape), "dtype": str(shape.dtype), "chunks": chunks}


def _check_array(key: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array):
        raise CheckpointError(f"A leaf must be a jax.Array. {key} is a {type(leaf).__name__}. Use jnp.asarray.")
    if leaf.is_deleted():
        raise CheckpointError(f"{key} was donated or deleted. Save the arrays that the last step returned.")


CONVERTED = ("float32", "bfloat16")
"""The dtypes of weights that are read as each other where that is asked for."""


def check_leaf(step: int, key: str, leaf: Any, leaves: Mapping[str, Any], *, converts: bool = False) -> None:
    """Raises `CheckpointError` for a leaf that is not saved, or is saved in another shape or dtype. `converts` says
    whether float32 may be read as bfloat16, and the other way.
    """
    saved = leaves.get(key)
    if saved is None:
        raise CheckpointError(
            f"Every leaf to restore must be in the checkpoint. {key} is not in step {step}. "
            "The model or optimizer is another than the one that was saved."
        )
    found, asked = (tuple(saved["shape"]), saved["dtype"]), (tuple(leaf.shape), str(leaf.dtype))
    if converts and found[1] in CONVERTED and asked[1] in CONVERTED:
        asked = asked[0], found[1]
    if found != asked:
        raise CheckpointError(
            f"A leaf must be restored with its saved shape and dtype. {key} is {found[1]}{list(found[0])} in "
            f"step {step}; asked for {leaf.dtype}{list(leaf.shape)}. Configure the model as it was when it was saved."
        )


def check_weights(
    step: int, wanted: Mapping[str, Any], leaves: Mapping[str, Any], directory: object, *, converts: bool = False
) -> None:
    """Raises `CheckpointError` unless the parameters and other state of a checkpoint, by key, are those of a model."""
    for key, leaf in wanted.items():
        check_leaf(step, key, leaf, leaves, converts=converts)
    more = [key for key in leaves if key.startswith(WEIGHTS) and key not in wanted]
    if more:
        raise CheckpointError(
            f"Every weight of a checkpoint must belong to the model. {more[0]} of step {step} in {directory} does not. "
            "Configure the model as it was when it was saved."
        )


def with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, on the first device of this process unless it says where."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
