"""The files of leaves, named and laid out as Orbax does: what a process writes of those whose shards it holds.

A leaf is an uncompressed Zarr array of version 2: a file `.zarray`, and one for each chunk with its numbers in C order.
So a checksum is one of a single leaf, and whoever restores some leaves reads only theirs.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from meshpipe.checkpoint.chunks import Region, chunks_in, inside, whole
from meshpipe.checkpoint.contents import Content
from meshpipe.checkpoint.names import DOCUMENT, ZARRAY, directory_name
from meshpipe.checkpoint.schema import zarray

_Index = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class HeldShard:
    """A shard whose bytes stay as they are, also when its array is donated."""

    key: str
    region: Region
    values: np.ndarray

    @property
    def itemsize(self) -> int:
        return self.values.itemsize

    def read(self, part: Region) -> np.ndarray:
        """The values of a part of the leaf."""
        return self.values[inside(part, self.region)]


@dataclass(frozen=True)
class ReadShard:
    """A whole leaf whose values are read from elsewhere when they are written, a part at a time."""

    key: str
    region: Region
    itemsize: int
    read: Callable[[Region], np.ndarray]
    """The values of a part of the leaf."""


Shard = HeldShard | ReadShard


def hold_shards(items: Mapping[str, Mapping[str, jax.Array]]) -> list[Shard]:
    """The first replicas of all shards that are in this process.

    On accelerators they are copies in the host's memory, which are complete when this returns. On CPU devices they are
    the arrays' own memory, which is not used again while something looks at it.
    """
    places: dict[tuple[Any, ...], list[tuple[int, Region]]] = {}
    own: list[tuple[str, Region, jax.Array]] = []
    for leaves in items.values():
        for key, leaf in leaves.items():
            layout = (leaf.sharding, leaf.shape)
            # Asked of one leaf of each layout: the loop waits for this, and the shards of a leaf are objects that JAX
            # makes when they are first asked for.
            if layout not in places:
                places[layout] = _first_replicas(leaf)
            own += [(key, region, leaf.addressable_data(number)) for number, region in places[layout]]
    for _, _, data in own:
        if any(device.platform != "cpu" for device in data.devices()):
            data.copy_to_host_async()
    return [HeldShard(key, region, np.ascontiguousarray(data)) for key, region, data in own]


def _first_replicas(leaf: jax.Array) -> list[tuple[int, Region]]:
    """The number among this process's shards, and the part of the leaf, of every shard that has replica 0 here."""
    return [
        (number, tuple(slice(*part.indices(size)[:2]) for part, size in zip(shard.index, leaf.shape, strict=True)))
        for number, shard in enumerate(leaf.addressable_shards)
        if shard.replica_id == 0
    ]


def own_files(shards: Sequence[Shard], index: _Index) -> dict[str, Content]:
    """The files of these shards, by name. The process that has a leaf's first shard describes the leaf too.

    What is in them is made when they are written: several are at once, and only for moments does one hold the
    interpreter's lock, for which the loop of the trainer would wait.
    """
    files: dict[str, Content] = {}
    for shard in shards:
        leaf = index[shard.key]
        folder = f"{leaf['item']}/{directory_name(shard.key)}"
        full = math.prod(leaf["chunks"]) * shard.itemsize
        for name, part in chunks_in(shard.region, leaf["shape"], leaf["chunks"]):
            size = math.prod(bounds.stop - bounds.start for bounds in part) * shard.itemsize
            files[f"{folder}/{name}"] = Content(partial(_bytes_of, shard, part), full - size)
        if not any(part.start for part in shard.region):
            files[f"{folder}/{ZARRAY}"] = Content(partial(_description, leaf))
    return files


def _bytes_of(shard: Shard, part: Region) -> memoryview:
    values = np.ascontiguousarray(shard.read(part))
    return values.reshape(-1).view(np.uint8).data


def _description(leaf: Mapping[str, Any]) -> bytes:
    return json.dumps(zarray(leaf["shape"], leaf["dtype"], leaf["chunks"]), separators=(",", ":")).encode()


def document_files(document: bytes, index: _Index) -> dict[str, Content]:
    """What is written once for all: the document, and for each item the list of its leaves that Orbax looks for."""
    trees: dict[str, dict[str, Any]] = {}
    for key, leaf in _with_elements(index):
        trees.setdefault(leaf["item"], {})[str((directory_name(key),))] = {
            "key_metadata": [{"key": directory_name(key), "key_type": 2}],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    options = {"use_ocdbt": False, "use_zarr3": False, "store_array_data_equal_to_fill_value": True}
    texts = {
        f"{item}/_METADATA": json.dumps({"tree_metadata": tree, **options, "custom_metadata": None}).encode()
        for item, tree in trees.items()
    }
    return {name: Content(text) for name, text in ({DOCUMENT: document} | texts).items()}


def all_files(index: _Index) -> set[str]:
    """The names of the files of all leaves, whichever processes have their shards."""
    return {
        f"{leaf['item']}/{directory_name(key)}/{name}"
        for key, leaf in _with_elements(index)
        for name in leaf_files(leaf)
    }


def leaf_files(leaf: Mapping[str, Any]) -> Iterator[str]:
    """The names of the files in a leaf's folder."""
    yield ZARRAY
    for name, _ in chunks_in(whole(leaf["shape"]), leaf["shape"], leaf["chunks"]):
        yield name


def _with_elements(index: _Index) -> list[tuple[str, Mapping[str, Any]]]:
    """Arrays without elements have no files: Orbax saves none."""
    return [(key, leaf) for key, leaf in index.items() if 0 not in leaf["shape"]]
