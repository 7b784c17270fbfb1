"""Reading leaves from files of tensors to the devices that want them: of each, the parts that this process needs.

They are read in slices that stay in the processor's cache, and written straight to their places in the memory that the
arrays will have: reading needs next to no memory of its own.
"""

import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from meshpipe.checkpoint.chunks import Region, inside, overlap
from meshpipe.checkpoint.files import for_each
from meshpipe.checkpoint.memory import aligned_bytes
from meshpipe.weights.entry import Entry
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.quantised import WAY_OUT
from meshpipe.weights.tensor_file import Tensor, part_bytes, read_part

READERS = 4
"""Pieces that are read at once."""
PIECE = 4 << 20
"""Bytes of a piece: the disk reads ahead in each."""
LEAST_SLICE, MOST_SLICE = 64 << 10, 1 << 20
"""Bytes of a slice of a piece: all readers have two of them, and want memory in proportion to what is read."""
_LINE = 64
"""Bytes of a line of the processor's cache."""
Task = Callable[[], None]
Bounds = tuple[tuple[int, int], ...]
"""Start and stop of a part of a leaf in each dim."""
Target = tuple[Region, np.ndarray]
"""A part of a leaf, and where its values, or their bits, are written to."""


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
            f"Weights must be floating numbers. Got {name} in {tensor.file}, which is {tensor}. {WAY_OUT}"
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
    size = min(max(sum(leaf.nbytes for leaf in leaves.values()) >> 10, LEAST_SLICE), MOST_SLICE)
    tasks = [task for leaf in leaves.values() for task in leaf.tasks(size)]
    for_each(lambda task: task(), tasks, "weights", READERS)
    return {path: leaf.array() for path, leaf in leaves.items()}


def read_region(source: Source, leaf: Any, part: Region) -> np.ndarray:
    """A part of a leaf, which has a shape and a dtype, in memory of its own."""
    values = np.zeros([bounds.stop - bounds.start for bounds in part], leaf.dtype)
    sizes = source.entry.seen_shape(leaf.shape)
    target = part, _target(values, source.tensor.dtype)
    for piece in pieces(source.tensor, sizes, source.entry.seen_region(part), MOST_SLICE):
        _read_slice(source, sizes, piece, [target])
    return values


class _LeafRead:
    """A leaf on its way from its file to the devices of this process."""

    def __init__(self, source: Source, wanted: jax.ShapeDtypeStruct) -> None:
        assert wanted.sharding is not None
        self._source, self._wanted = source, wanted
        self._sizes = source.entry.seen_shape(wanted.shape)
        indices = wanted.sharding.addressable_devices_indices_map(wanted.shape)
        self._regions = {bounds: _region(bounds) for index in indices.values() for bounds in [self._bounds(index)]}
        self._buffers: dict[Bounds, np.ndarray] = {}
        self._targets: Sequence[Target] = ()
        self._lock, self._left = threading.Lock(), 0
        self._array: jax.Array | None = None

    @property
    def nbytes(self) -> int:
        """Of all parts of the leaf that this process needs."""
        return sum(map(_size, self._regions.values())) * self._wanted.dtype.itemsize

    def tasks(self, slice_bytes: int) -> Sequence[Task]:
        """What has to be done, in any order and at once."""
        made: list[Task] = [
            functools.partial(self._read, piece, slice_bytes)
            for part in _joined(list(self._regions.values()))
            for piece in pieces(self._source.tensor, self._sizes, self._source.entry.seen_region(part), PIECE)
        ]
        self._left = len(made)
        return made

    def array(self) -> jax.Array:
        """The leaf, once all tasks are done."""
        assert self._array is not None
        return self._array

    def _read(self, piece: Region, slice_bytes: int) -> None:
        with self._lock:
            if not self._buffers:
                self._buffers = {bounds: _zeros(bounds, self._wanted.dtype) for bounds in self._regions}
                dtype = self._source.tensor.dtype
                self._targets = [(self._regions[bounds], _target(own, dtype)) for bounds, own in self._buffers.items()]
        for part in pieces(self._source.tensor, self._sizes, piece, slice_bytes):
            _read_slice(self._source, self._sizes, part, self._targets)
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
        self._buffers, self._targets = {}, ()

    def _bounds(self, index: tuple[slice, ...] | None) -> Bounds:
        return tuple(part.indices(size)[:2] for part, size in zip(index or (), self._wanted.shape, strict=True))


def pieces(tensor: Tensor, sizes: tuple[int, ...], region: Region, most: int) -> Iterator[Region]:
    """The parts, of at most so many bytes where rows allow it, that make up a part of a tensor, which is seen with dims
    of these sizes.
    """
    todo = [region]
    while todo:
        part = todo.pop()
        size = part_bytes(tensor, sizes, part)
        dim = next((dim for dim, bounds in enumerate(part) if bounds.stop - bounds.start > 1), None)
        if size <= most or dim is None:
            yield part
            continue
        start, stop = part[dim].start, part[dim].stop
        step = max(1, (stop - start) * most // size)
        cut = [(*part[:dim], slice(i, min(i + step, stop)), *part[dim + 1 :]) for i in range(start, stop, step)]
        if len(cut) == 1 or (step == 1 and dim == len(part) - 1):
            yield from cut
        else:
            todo += reversed(cut)


def _read_slice(source: Source, sizes: tuple[int, ...], part: Region, targets: Sequence[Target]) -> None:
    """Reads a part of the tensor, and writes it to the targets that have some of it."""
    entry, dtype = source.entry, targets[0][1].dtype
    seen, region = read_part(source.tensor, sizes, part), entry.leaf_region(part)
    seen = seen.view(dtype) if dtype.kind == "u" else seen
    values = entry.to_leaf(seen if entry.keeps_order else _spread(seen))
    for held, target in targets:
        if (common := overlap(region, held)) is not None:
            target[inside(common, held)] = values[inside(common, region)]


def _target(buffer: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Where values of a dtype are written to in a buffer of zeros: bits where these stay the same, since for dtypes
    that are not its own NumPy holds the interpreter's lock.
    """
    if buffer.dtype == dtype:
        return buffer.view(f"u{dtype.itemsize}")
    if buffer.dtype == np.float32 and dtype == ml_dtypes.bfloat16:
        return buffer.reshape(-1).view(np.uint16).reshape(*buffer.shape, 2)[..., 1]  # the upper halves
    return buffer


def _spread(values: np.ndarray) -> np.ndarray:
    """A copy whose rows are an odd number of cache lines apart. If that were a power of two, as it often is, a column
    would share a few places of the cache, and to transpose would be to read each line from memory many times.
    """
    dim = next((dim for dim, size in enumerate(values.shape) if size > 1), 0)
    rows, row = values.shape[dim], math.prod(values.shape[dim + 1 :])
    lines = -(-row * values.itemsize // _LINE) | 1
    spread = np.empty((rows, lines * _LINE // values.itemsize), values.dtype)[:, :row].reshape(values.shape)
    spread[...] = values
    return spread


def _joined(regions: Sequence[Region]) -> Sequence[Region]:
    """The one region that these make up together, which is read once for all of them; or else these."""
    bounds = [list(zip(*((part.start, part.stop) for part in dim), strict=True)) for dim in zip(*regions, strict=True)]
    hull = tuple(slice(min(starts), max(stops)) for starts, stops in bounds)
    return [hull] if _size(hull) == sum(map(_size, regions)) else regions


def _size(region: Region) -> int:
    return math.prod(part.stop - part.start for part in region)


def _region(bounds: Bounds) -> Region:
    return tuple(slice(*pair) for pair in bounds)


def _zeros(bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    shape = [stop - start for start, stop in bounds]
    return aligned_bytes(math.prod(shape) * dtype.itemsize, zeros=True).view(dtype).reshape(shape)
