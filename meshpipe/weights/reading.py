"""Reading leaves from files of tensors to the devices that want them: of each, the parts that this process needs.

They are read in pieces, a few at a time, each straight to its place in the memory that the array will have.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from meshpipe.checkpoint.chunks import Region, inside
from meshpipe.checkpoint.files import for_each
from meshpipe.checkpoint.memory import aligned_bytes
from meshpipe.weights.entry import Entry
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.tensor_file import Tensor, part_bytes, read_part

READERS = 4
"""Pieces that are read at once."""
PIECE = 2 << 20
"""Bytes of a piece."""
Task = Callable[[], None]


@dataclass(frozen=True)
class Source:
    """What a leaf is read from."""

    entry: Entry
    tensor: Tensor


def check_dtype(name: str, tensor: Tensor, dtype: np.dtype) -> None:
    """Raises `WeightsError` unless every value of the tensor is one of the dtype as well, or is rounded to the bfloat16
    that was asked for.
    """
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise WeightsError(
            f"Weights are floating numbers. {name} in {tensor.file} is {tensor}: quantised weights are not read. "
            "Take the folder of the model before it was quantised."
        )
    ours, theirs = jnp.finfo(dtype), jnp.finfo(tensor.dtype)
    rounded = dtype == ml_dtypes.bfloat16 and tensor.dtype in (np.float32, np.float16)
    if not rounded and (theirs.nmant > ours.nmant or theirs.maxexp > ours.maxexp):
        raise WeightsError(
            f"A parameter must hold every value of its tensor. {name} in {tensor.file} is {tensor.dtype}, and the "
            f"model's parameter is {np.dtype(dtype)}. Save the folder with dtype {np.dtype(dtype)}."
        )


def read_leaves(sources: Mapping[str, Source], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The leaves `wanted`, which have shardings, by path; those without a device in this process are left out."""
    leaves = {
        path: _LeafRead(sources[path], shape)
        for path, shape in wanted.items()
        if shape.sharding is not None and shape.sharding.addressable_devices
    }
    for_each(lambda task: task(), [task for leaf in leaves.values() for task in leaf.tasks()], "weights", READERS)
    return {path: leaf.array() for path, leaf in leaves.items()}


def read_region(source: Source, leaf: Any, part: Region) -> np.ndarray:
    """A part of a leaf, which has a shape and a dtype, in memory of its own."""
    values = np.empty([bounds.stop - bounds.start for bounds in part], leaf.dtype)
    for piece in pieces(source, leaf.shape, part):
        seen = read_part(source.tensor, source.entry.seen_shape(leaf.shape), piece)
        put(values[inside(source.entry.leaf_region(piece), part)], source.entry.to_leaf(seen))
    return values


class _LeafRead:
    """A leaf on its way from its file to the devices of this process."""

    def __init__(self, source: Source, wanted: jax.ShapeDtypeStruct) -> None:
        assert wanted.sharding is not None
        self._source, self._wanted = source, wanted
        indices = wanted.sharding.addressable_devices_indices_map(wanted.shape)
        self._regions = {bounds: _region(bounds) for index in indices.values() for bounds in [self._bounds(index)]}
        self._buffers: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        self._lock, self._left = threading.Lock(), 0
        self._array: jax.Array | None = None

    def tasks(self) -> Sequence[Task]:
        """What has to be done, in any order and at once."""
        made: list[Task] = []
        for bounds, region in self._regions.items():
            for piece in pieces(self._source, self._wanted.shape, region):
                made.append(functools.partial(self._read, bounds, piece))
        self._left = len(made)
        return made

    def array(self) -> jax.Array:
        """The leaf, once all tasks are done."""
        assert self._array is not None
        return self._array

    def _read(self, bounds: tuple[tuple[int, int], ...], piece: Region) -> None:
        with self._lock:
            if not self._buffers:
                for other in self._regions:
                    self._buffers[other] = _empty([stop - start for start, stop in other], self._wanted.dtype)
        entry = self._source.entry
        seen = read_part(self._source.tensor, entry.seen_shape(self._wanted.shape), piece)
        place = inside(entry.leaf_region(piece), self._regions[bounds])
        put(self._buffers[bounds][place], entry.to_leaf(seen))
        with self._lock:
            self._left -= 1
            if not self._left:
                self._hand_over()

    def _hand_over(self) -> None:
        assert self._wanted.sharding is not None
        # CPU devices take the buffers as they are.
        self._array = jax.make_array_from_callback(
            self._wanted.shape, self._wanted.sharding, lambda index: self._buffers[self._bounds(index)]
        )
        self._buffers = {}

    def _bounds(self, index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        return tuple(part.indices(size)[:2] for part, size in zip(index or (), self._wanted.shape, strict=True))


def pieces(source: Source, leaf_shape: Sequence[int], leaf_region: Region) -> Iterator[Region]:
    """The parts of the tensor, its dims apart, that make up a part of the leaf: few enough bytes each."""
    sizes, region = source.entry.seen_shape(leaf_shape), source.entry.seen_region(leaf_region)
    todo = [region]
    while todo:
        part = todo.pop()
        size = part_bytes(source.tensor, sizes, part)
        dim = next((dim for dim, bounds in enumerate(part) if bounds.stop - bounds.start > 1), None)
        if size <= PIECE or dim is None:
            yield part
            continue
        start, stop = part[dim].start, part[dim].stop
        step = max(1, (stop - start) * PIECE // size)
        cut = [(*part[:dim], slice(i, min(i + step, stop)), *part[dim + 1 :]) for i in range(start, stop, step)]
        if len(cut) == 1 or (step == 1 and dim == len(part) - 1):
            yield from cut
        else:
            todo += reversed(cut)


def put(target: np.ndarray, values: np.ndarray) -> None:
    """Writes values to their place, in its dtype."""
    if target.dtype == np.float32 and values.dtype == ml_dtypes.bfloat16:
        # The same, without the interpreter's lock.
        bits = target.view(np.uint32)
        bits[...] = values.view(np.uint16)
        np.left_shift(bits, 16, out=bits)
    else:
        target[...] = values


def _region(bounds: tuple[tuple[int, int], ...]) -> Region:
    return tuple(slice(*pair) for pair in bounds)


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return aligned_bytes(size).view(dtype).reshape(shape)
