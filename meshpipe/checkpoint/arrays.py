"""Reading leaves: the files that hold a part of what this process needs, in parallel, each checked while it is read.

Where a file holds what a device needs, it is read to where the device's array will be; where the layout is another, it
is read into memory of its own, at most `READERS` files at a time, and cut from there.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshpipe.checkpoint.checksums import Checksums, file_problem
from meshpipe.checkpoint.chunks import Region, chunk_count, chunks_in, inside, overlap
from meshpipe.checkpoint.files import for_each
from meshpipe.checkpoint.memory import aligned_bytes
from meshpipe.checkpoint.names import ZARRAY, directory_name
from meshpipe.checkpoint.schema import SchemaError, check_zarray
from meshpipe.documents import DamagedFileError, parse_json

READERS = 8
"""Files that are read at once: nothing else is done meanwhile, and the disk must not wait for those that take CRCs."""
Bounds = tuple[tuple[int, int], ...]
"""Start and stop of a part of an array in each dim."""
Task = Callable[[], dict[str, str]]
"""Reads a file; what is wrong with it."""


def read_leaves(
    step: Path,
    wanted: Mapping[tuple[int, str], jax.ShapeDtypeStruct],
    index: Mapping[str, Mapping[str, Any]],
    files: Checksums,
) -> tuple[dict[tuple[int, str], jax.Array], dict[str, str]]:
    """Some leaves of the step in this folder with their shardings, by stage and key, and what is wrong with their
    files.

    Shapes must be the saved ones, and so must dtypes, but that values are rounded to a shorter one on the way. The
    index and the list of files must have been checked.
    """
    leaves = {at: _LeafRead(step, at[1], index[at[1]], shape, files) for at, shape in wanted.items()}
    problems: dict[str, str] = {}

    def run(tasks: Sequence[Task]) -> None:
        for found in for_each(lambda task: task(), tasks, "checkpoint", READERS):
            problems.update(found)

    # Only what earlier versions saved must be asked how it was cut into files before these can be read.
    run([leaf.describe for leaf in leaves.values() if not leaf.is_cut])
    if not problems:
        run([task for leaf in leaves.values() for task in leaf.reads()])
    return ({} if problems else {at: leaf.array() for at, leaf in leaves.items()}), problems


class _LeafRead:
    """One leaf on its way from its files to the devices of this process."""

    def __init__(
        self, step: Path, key: str, saved: Mapping[str, Any], wanted: jax.ShapeDtypeStruct, files: Checksums
    ) -> None:
        self._step, self._saved, self._wanted, self._files = step, saved, wanted, files
        self._folder = f"{saved['item']}/{directory_name(key)}"
        self._dtype = jnp.dtype(saved["dtype"])
        self._lock = threading.Lock()
        assert wanted.sharding is not None
        indices = wanted.sharding.addressable_devices_indices_map(wanted.shape)
        shape = wanted.shape
        self._regions = {_bounds(index or (), shape) for index in indices.values()}
        self._buffers: dict[Bounds, np.ndarray] = {}
        self._left = 0
        self._array: jax.Array | None = None
        self._chunks: list[int] | None = saved.get("chunks")
        self._described = not wanted.size

    @property
    def is_cut(self) -> bool:
        """Whether it is known how the leaf was cut into files, if only from the index."""
        return self._described or self._chunks is not None

    def describe(self) -> dict[str, str]:
        """Reads how the leaf was cut into files; what is wrong with that."""
        self._described = True
        name = f"{self._folder}/{ZARRAY}"
        text = bytearray(min(self._files[name][0], 1 << 16))
        problem = (
            "is larger than a description of an array"
            if len(text) < self._files[name][0]
            else file_problem(self._step, name, self._files[name], memoryview(text))
        )
        if problem:
            return {name: problem}
        try:
            chunks = check_zarray(parse_json(bytes(text)), self._saved)
        except DamagedFileError as error:
            return {name: str(error)}
        except SchemaError as error:
            return {name: f"does not describe the leaf: {error}"}
        if chunks != self._saved.get("chunks", chunks) or chunk_count(self._wanted.shape, chunks) > len(self._files):
            return {name: "does not describe the leaf: its chunks are not those of the files"}
        self._chunks = chunks
        size = int(np.prod(chunks, dtype=np.int64)) * self._dtype.itemsize
        unknown = {part for part in self._parts() if self._files.get(f"{self._folder}/{part}", (0, 0))[0] != size}
        return {f"{self._folder}/{part}": "has not the size that its leaf asks for" for part in unknown}

    def reads(self) -> list[Task]:
        """What has to be done for the leaf, in any order and at once."""
        if not self._wanted.size:
            return []
        parts = self._parts()
        self._left = len(parts)
        tasks: list[Task] = [functools.partial(self._read, name, part) for name, part in parts.items()]
        return tasks if self._described else [self.describe, *tasks]

    def _parts(self) -> dict[str, Region]:
        """The files to read, and the part of the leaf in each."""
        assert self._chunks is not None
        parts: dict[str, Region] = {}
        for bounds in self._regions:
            parts |= chunks_in(_region(bounds), self._wanted.shape, self._chunks)
        return parts

    def _read(self, name: str, part: Region) -> dict[str, str]:
        """Reads one file into the buffers that need a part of it; the last one hands all to the devices."""
        with self._lock:
            if not self._buffers:
                for bounds in self._regions:
                    self._buffers[bounds] = _empty([stop - start for start, stop in bounds], self._wanted.dtype)
        file = f"{self._folder}/{name}"
        into, copies = self._place(part)
        problem = file_problem(self._step, file, self._files[file], into.reshape(-1).view(np.uint8).data)
        if problem:
            return {file: problem}
        for target, source in copies:
            target[...] = into[source]
        with self._lock:
            self._left -= 1
            if not self._left:
                self._hand_over()
        return {}

    def array(self) -> jax.Array:
        """The leaf, once every file was read."""
        assert self._wanted.sharding is not None
        if not self._wanted.size:
            return jax.device_put(np.zeros(self._wanted.shape, self._wanted.dtype), self._wanted.sharding)
        assert self._array is not None
        return self._array

    def _place(self, part: Region) -> tuple[np.ndarray, list[tuple[np.ndarray, Region]]]:
        """Where to read a file to, and what to copy from there to where."""
        copies: list[tuple[np.ndarray, Region]] = []
        for bounds, buffer in self._buffers.items():
            common = overlap(part, _region(bounds))
            if common is not None:
                # With an ellipsis a scalar is a view, too.
                place: tuple[Any, ...] = (*inside(common, _region(bounds)), ...)
                copies.append((buffer[place], inside(common, part)))
        assert self._chunks is not None
        first = copies[0][0]
        fits = first.dtype == self._dtype and first.shape == tuple(self._chunks) and first.flags.c_contiguous
        if len(copies) == 1 and fits:
            return first, []
        return np.empty(self._chunks, self._dtype), copies

    def _hand_over(self) -> None:
        shape, sharding = self._wanted.shape, self._wanted.sharding
        assert sharding is not None
        # Much cheaper than an array for each device; CPU devices take the buffers as they are.
        self._array = jax.make_array_from_callback(
            shape, sharding, lambda index: self._buffers[_bounds(index or (), shape)]
        )
        self._buffers = {}


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _region(bounds: Bounds) -> Region:
    return tuple(slice(*pair) for pair in bounds)


def _empty(shape: list[int], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    return aligned_bytes(size).view(dtype).reshape(shape)
