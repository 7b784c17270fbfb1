"""The shards of leaves as files, named and laid out as Orbax does: what a process of several writes, and what it reads.

A leaf is an uncompressed Zarr array of version 2: a file `.zarray`, and one for each shard with its numbers in C order.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from meshpipe.checkpoint.items import META, directory_name

ZARRAY = ".zarray"
_Index = Mapping[str, Mapping[str, Any]]
"""For each leaf its item, its shape, and `chunks`, the shape of each of its shards."""


def own_files(items: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, bytes | memoryview]:
    """The bytes of the first replicas of all shards that are in this process, by the names of their files.

    They stay as they are when the arrays are donated: on accelerators they are copies, and the memory of a CPU array is
    not used again while something looks at it. The process that has a leaf's first shard describes the leaf too.
    """
    own = [
        (f"{item}/{directory_name(key)}", leaf, shard)
        for item, leaves in items.items()
        for key, leaf in leaves.items()
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]
    for _, _, shard in own:
        shard.data.copy_to_host_async()
    files: dict[str, bytes | memoryview] = {}
    for folder, leaf, shard in own:
        chunks = leaf.sharding.shard_shape(leaf.shape)
        (name,) = _chunk_names(shard.index, leaf.shape, chunks)
        files[f"{folder}/{name}"] = np.ascontiguousarray(shard.data).reshape(-1).view(np.uint8).data
        if not any(part.start for part in shard.index):
            files[f"{folder}/{ZARRAY}"] = _zarray(leaf, chunks)
    return files


def document_files(document: Mapping[str, Any]) -> dict[str, bytes | memoryview]:
    """What is written once for all: the document, and for each item the list of its leaves that Orbax looks for."""
    files: dict[str, bytes | memoryview] = {f"{META}/metadata": json.dumps(document).encode()}
    trees: dict[str, dict[str, Any]] = {}
    for key, leaf in _with_elements(document["leaves"]):
        trees.setdefault(leaf["item"], {})[str((directory_name(key),))] = {
            "key_metadata": [{"key": directory_name(key), "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    options = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    for item, tree in trees.items():
        files[f"{item}/_METADATA"] = json.dumps({"tree_metadata": tree, **options, "custom_metadata": None}).encode()
    return files


def all_files(leaves: _Index) -> set[str]:
    """The names of the files of all leaves, whichever processes have their shards."""
    return {
        f"{leaf['item']}/{directory_name(key)}/{name}"
        for key, leaf in _with_elements(leaves)
        for name in (ZARRAY, *_chunk_names((slice(None),) * len(leaf["shape"]), leaf["shape"], leaf["chunks"]))
    }


def files_to_read(saved: Mapping[str, Any], wanted: jax.ShapeDtypeStruct) -> set[str] | None:
    """The names in a leaf's folder that this process needs, from what the index says of the leaf; None for all.

    Checkpoints of earlier versions do not say how a leaf was split.
    """
    chunks = saved.get("chunks")
    if chunks is None or not wanted.size:
        return None
    assert wanted.sharding is not None
    indices = wanted.sharding.addressable_devices_indices_map(wanted.shape).values()
    return {ZARRAY}.union(*(_chunk_names(index or (), wanted.shape, chunks) for index in indices))


def _with_elements(leaves: _Index) -> list[tuple[str, Mapping[str, Any]]]:
    """Orbax saves no array without elements."""
    return [(key, leaf) for key, leaf in leaves.items() if 0 not in leaf["shape"]]


def _chunk_names(index: Sequence[slice], shape: Sequence[int], chunks: Sequence[int]) -> list[str]:
    """The names of the files that hold a part of an array."""
    numbers = [
        range(start // chunk, -(-stop // chunk))
        for (start, stop, _), chunk in zip(
            (part.indices(size) for part, size in zip(index, shape, strict=True)), chunks, strict=True
        )
    ]
    return [".".join(map(str, number)) or "0" for number in itertools.product(*numbers)]


def _zarray(leaf: Any, chunks: Sequence[int]) -> bytes:
    dtype = np.dtype(leaf.dtype)
    description = {
        "chunks": list(chunks),
        "compressor": None,
        "dimension_separator": ".",
        # Types that NumPy does not have, such as bfloat16, go by their names.
        "dtype": dtype.str if dtype.isbuiltin == 1 else dtype.name,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(leaf.shape),
        "zarr_format": 2,
    }
    return json.dumps(description, separators=(",", ":")).encode()
