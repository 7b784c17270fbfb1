"""Files of tensors in the format of safetensors: what is in them, and reading parts of a tensor.

A file begins with the size of its header, 8 bytes; the header is JSON, and the tensors follow in C order. Parts are
read to where they are used, without mapping the file: mapped pages would count as memory of the process.
"""

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from meshpipe.checkpoint.chunks import Region, inside
from meshpipe.documents import DamagedFileError, is_count, parse_json
from meshpipe.weights.errors import WeightsError

DTYPES: dict[str, Any] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
LARGEST_HEADER = 100_000_000
"""Bytes of a header, as the library safetensors has it."""
_SHORTEST_RUN = 32 << 10
"""Bytes in a row below which it is faster to read what lies between them as well."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies, and what it is."""

    file: Path
    offset: int
    """Of its first byte in the file."""
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises `WeightsError` for a file that is not whole, or not of this format."""
    try:
        descriptor = _open(file)
        with open(descriptor, "rb") as opened:
            size = os.fstat(descriptor).st_size
            length = int.from_bytes(opened.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise DamagedFileError(_what_is_wrong(size, length))
            header = parse_json(opened.read(length))
        return _tensors(file, header, 8 + length, size)
    except (OSError, DamagedFileError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WeightsError(
            f"Weights are read from whole files of safetensors. Got {file}: {reason}. Download or copy it again."
        ) from None


def _what_is_wrong(size: int, length: int) -> str:
    if size < 8:
        return f"it has {size} bytes, too few for a header"
    if length > LARGEST_HEADER:
        return (
            f"its header would have {length} bytes, more than the {LARGEST_HEADER} that one may have: it is of another "
            "format"
        )
    return f"its header would have {length} bytes, and {size - 8} follow: it is truncated, or of another format"


def _tensors(file: Path, header: Any, start: int, size: int) -> dict[str, Tensor]:
    if not isinstance(header, dict):
        raise DamagedFileError("its header is not a JSON object")
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or not _is_entry(entry):
            raise DamagedFileError(f"its header describes {name!r:.80} by {entry!r:.100}")
        if entry["dtype"] not in DTYPES:
            raise DamagedFileError(f"the dtype of {name} is {entry['dtype']}, which is not known here")
        begin, end = entry["data_offsets"]
        tensor = Tensor(file, start + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if end - begin != tensor.nbytes:
            raise DamagedFileError(f"{name} is {tensor}, {tensor.nbytes} bytes, and its header gives it {end - begin}")
        if start + end > size:
            raise DamagedFileError(f"{name} ends at byte {start + end}, and it has {size}: it is truncated")
        found[name] = tensor
    _check_places(found, start, size)
    return found


def _check_places(tensors: dict[str, Tensor], start: int, size: int) -> None:
    """Tensors must fill the file one after the other: where they do not, a name may have another tensor's bytes."""
    end, before = start, "its header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise DamagedFileError(f"{name} begins at byte {tensor.offset}, and {before} ends at byte {end}")
        end, before = tensor.offset + tensor.nbytes, name
    if end != size:
        raise DamagedFileError(f"{before} ends at byte {end}, and it has {size}")


def _is_entry(entry: dict[str, Any]) -> bool:
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return (
        isinstance(entry.get("dtype"), str)
        and isinstance(shape, list)
        and all(map(is_count, shape))
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(map(is_count, offsets))
        and offsets[0] <= offsets[1]
    )


def read_part(tensor: Tensor, sizes: tuple[int, ...], region: Region) -> np.ndarray:
    """A part of a tensor that is seen with dims of these sizes, whose product is its own.

    Raises `WeightsError` when the file ends before.
    """
    wide = _widened(sizes, region, tensor.dtype.itemsize)
    shape = tuple(part.stop - part.start for part in wide)
    values = np.empty(shape, tensor.dtype)
    into = values.reshape(-1).view(np.uint8).data
    last = _last_partial(sizes, wide)
    run = math.prod(shape[last:]) * tensor.dtype.itemsize
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    inner = sum(part.start * stride for part, stride in zip(wide[last:], strides[last:], strict=True))
    descriptor = _open(tensor.file)
    try:
        for number, index in enumerate(np.ndindex(shape[:last])):
            outer = sum((wide[dim].start + i) * strides[dim] for dim, i in enumerate(index))
            offset = tensor.offset + (outer + inner) * tensor.dtype.itemsize
            _read_into(descriptor, into[number * run : (number + 1) * run], offset, tensor.file)
    finally:
        os.close(descriptor)
    return values[inside(region, wide)]


def middle_bytes(tensor: Tensor, count: int = 64) -> bytes:
    """A few bytes from the middle of a tensor."""
    descriptor = _open(tensor.file)
    try:
        return os.pread(descriptor, min(count, tensor.nbytes), tensor.offset + max(0, tensor.nbytes - count) // 2)
    finally:
        os.close(descriptor)


def part_bytes(tensor: Tensor, sizes: tuple[int, ...], region: Region) -> int:
    """Bytes of memory that `read_part` takes."""
    wide = _widened(sizes, region, tensor.dtype.itemsize)
    return math.prod(part.stop - part.start for part in wide) * tensor.dtype.itemsize


def _widened(sizes: tuple[int, ...], region: Region, itemsize: int) -> Region:
    """The region, with whole dims where its own bytes would be read in short pieces."""
    wide = list(region)
    while (last := _last_partial(sizes, tuple(wide))) > 0:
        run = math.prod(part.stop - part.start for part in wide[last:]) * itemsize
        if run >= _SHORTEST_RUN or all(part.stop - part.start == 1 for part in wide[:last]):
            break
        wide[last] = slice(0, sizes[last])
    return tuple(wide)


def _last_partial(sizes: tuple[int, ...], region: Region) -> int:
    """The last dim of which the region has only a part; what is in it and the dims after it lies in a row."""
    partial = [dim for dim, part in enumerate(region) if part.stop - part.start != sizes[dim]]
    return max(partial, default=0)


def _read_into(descriptor: int, into: memoryview, offset: int, file: Path) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if not count:
            raise WeightsError(f"Weights are read from whole files. Got {file}, which has become shorter meanwhile.")
        done += count


def _open(file: Path) -> int:
    """A descriptor of a regular file; a link to one is as good, as in the cache of a hub."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedFileError("it is not a regular file")
    return descriptor
