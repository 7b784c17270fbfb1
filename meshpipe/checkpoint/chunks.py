"""How a leaf is cut into files: chunks of a Zarr array, each within one shard and contiguous in its memory."""

import itertools
import math
from collections.abc import Iterator, Sequence

Region = tuple[slice, ...]
"""Which part of an array, with a start and a stop for each dim."""
LARGEST_CHUNK = 32 << 20
"""Bytes of a file, unless a shard has no fitting divisor. Files are written, read and checked in parallel, and a reader
that wants another part than a file has needs memory for the file.
"""


def chunk_shape(shape: Sequence[int], shard: Sequence[int], itemsize: int, largest: int) -> list[int]:
    """The shape of the chunks of an array with shards of the shape `shard`: the shard, cut along its first dims until
    a chunk has at most `largest` bytes.

    Chunks must not cross shards, so a dim that is sharded is cut by a divisor; where none gives chunks of at least a
    sixteenth of `largest`, the dim stays whole. Other dims are cut evenly, and the last chunk is filled up with zeros.
    """
    chunk = list(shard)
    for axis, size in enumerate(shard):
        rest = itemsize * math.prod(chunk[axis + 1 :])
        if size * rest <= largest:
            break
        if size == shape[axis]:
            chunk[axis] = -(-size // -(-size // max(1, largest // rest)))
        else:
            chunk[axis] = _divisor(size, max(1, largest // rest), largest // 16 // rest)
        if chunk[axis] > 1:
            break
    return chunk


def chunks_in(region: Sequence[slice], shape: Sequence[int], chunks: Sequence[int]) -> Iterator[tuple[str, Region]]:
    """The name of every chunk that has a part of a region, and the part of the array that it holds."""
    bounds = [part.indices(size)[:2] for part, size in zip(region, shape, strict=True)]
    numbers = [range(start // chunk, -(-stop // chunk)) for (start, stop), chunk in zip(bounds, chunks, strict=True)]
    for number in itertools.product(*numbers):
        part = (
            slice(i * chunk, min((i + 1) * chunk, size)) for i, chunk, size in zip(number, chunks, shape, strict=True)
        )
        yield ".".join(map(str, number)) or "0", tuple(part)


def chunk_count(shape: Sequence[int], chunks: Sequence[int]) -> int:
    """How many chunks an array has; none where it has no elements."""
    return math.prod(-(-size // max(1, chunk)) for size, chunk in zip(shape, chunks, strict=True))


def whole(shape: Sequence[int]) -> Region:
    return tuple(slice(0, size) for size in shape)


def inside(part: Region, region: Region) -> Region:
    """A part of an array as a part of a region that contains it."""
    return tuple(
        slice(inner.start - outer.start, inner.stop - outer.start) for inner, outer in zip(part, region, strict=True)
    )


def overlap(first: Region, second: Region) -> Region | None:
    """What two parts of an array have in common, or None."""
    common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return None if any(part.start >= part.stop for part in common) else common


def _divisor(size: int, largest: int, smallest: int) -> int:
    """The largest divisor up to `largest`, or the size itself where that would be below `smallest`."""
    found = next(divisor for divisor in range(min(largest, size), 0, -1) if size % divisor == 0)
    return found if found >= smallest else size
