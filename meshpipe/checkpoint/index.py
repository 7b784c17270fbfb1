"""Which leaves a checkpoint holds, and whether they are those that are asked for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from meshpipe.checkpoint.items import directory_name

Tree = Mapping[str, Mapping[str, Any]]
"""What one stage saves: sections such as `params`, each a flat dict of arrays by leaf path."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit what is to be restored; the message gives the way out."""


def index_leaves(
    trees: Sequence[Tree], shapes: Sequence[Tree] | None = None
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, jax.Array]]]:
    """Where each leaf is to be found, and the arrays of each item; a leaf that several stages own is saved by the
    first.

    `shapes` has all leaves where some are only in other processes, and therefore not in `trees`.
    """
    index: dict[str, dict[str, Any]] = {}
    items: dict[str, dict[str, jax.Array]] = {}
    for stage, tree in enumerate(trees if shapes is None else shapes):
        item = f"stage_{stage}"
        for section, leaves in tree.items():
            for path, shape in leaves.items():
                key = f"{section}/{path}"
                leaf = shape if shapes is None else trees[stage].get(section, {}).get(path)
                if leaf is not None or shape.sharding.addressable_devices:
                    _check_array(key, leaf)
                chunks = list(shape.sharding.shard_shape(tuple(shape.shape)))
                entry = {"item": item, "shape": list(shape.shape), "dtype": str(shape.dtype), "chunks": chunks}
                first = index.setdefault(key, entry)
                if first is entry and leaf is not None and leaf.size:
                    items.setdefault(item, {})[key] = leaf
                elif (first["shape"], first["dtype"]) != (entry["shape"], entry["dtype"]):
                    raise CheckpointError(
                        f"A leaf that several stages own must be the same in each. {key} is "
                        f"{first['dtype']}{first['shape']} in {first['item']}, and "
                        f"{entry['dtype']}{entry['shape']} in {item}. Give them paths of their own."
                    )
    return index, items


def is_index(leaves: Any) -> bool:
    """Whether this, which is data from a file, is what `index_leaves` makes; versions before had no chunks."""
    return isinstance(leaves, dict) and all(
        re.fullmatch("stage_[0-9]+", leaf["item"])
        and all(isinstance(size, int) and size >= 0 for size in leaf["shape"])
        and ("chunks" not in leaf or _are_chunks(leaf["chunks"], leaf["shape"]))
        for leaf in leaves.values()
    )


def _are_chunks(chunks: Sequence[Any], shape: Sequence[int]) -> bool:
    return len(chunks) == len(shape) and all(
        isinstance(chunk, int) and min(1, size) <= chunk <= size for chunk, size in zip(chunks, shape, strict=True)
    )


def _check_array(key: str, leaf: Any) -> None:
    if not isinstance(leaf, jax.Array):
        raise CheckpointError(f"A leaf must be a jax.Array. {key} is a {type(leaf).__name__}. Use jnp.asarray.")
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise CheckpointError(f"A leaf must be plain numbers. {key} is a typed key. Save jax.random.key_data of it.")
    if leaf.is_deleted():
        raise CheckpointError(f"{key} was donated or deleted. Save the arrays that the last step returned.")
    if len(directory_name(key).encode()) > 255:
        raise CheckpointError(f"A leaf's path must have at most 255 bytes, being the name of a folder. Got {key}.")


def check_leaf(step: int, key: str, leaf: Any, leaves: Mapping[str, Any]) -> None:
    saved = leaves.get(key)
    if saved is None:
        raise CheckpointError(
            f"Every leaf to restore must be in the checkpoint. {key} is not in step {step}. "
            "The model or optimizer is another than the one that was saved."
        )
    found = (tuple(saved["shape"]), saved["dtype"])
    if found != (tuple(leaf.shape), str(leaf.dtype)):
        raise CheckpointError(
            f"A leaf must be restored with its saved shape and dtype. {key} is {found[1]}{list(found[0])} in "
            f"step {step}; asked for {leaf.dtype}{list(leaf.shape)}. Configure the model as it was when it was saved."
        )


def with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of an array, on the first device of this process unless it says where."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
