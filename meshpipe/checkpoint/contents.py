"""What files are to hold, and writing them: many at once, their checksums taken from memory, through to the disk."""

import ctypes
import itertools
import os
import resource
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from meshpipe.checkpoint.files import flush_folder, for_each

_PIECE = 1 << 20
"""Bytes of a write, so few that they are still in the processor's cache after their CRC."""
_FLUSHED_TOGETHER = 512
"""Files that are written before they are flushed. To flush a file takes milliseconds, in which the file system commits
its journal, but the commit holds for all files that were written by then.
"""
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if sys.platform == "linux" else None
if _sync_file_range is not None:
    _sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_START_WRITE = 2


@dataclass(frozen=True)
class Content:
    """What a file is to hold."""

    data: bytes | memoryview | Callable[[], bytes | memoryview]
    """The bytes, or what makes them when they are written."""
    padding: int = 0
    """Zeros after the data."""

    def read(self) -> memoryview:
        return memoryview(self.data() if callable(self.data) else self.data)


def write_files(folder: Path, contents: Mapping[str, Content]) -> dict[str, tuple[int, int]]:
    """Writes files into the folder and through to the disk; size and CRC-32 of what was to be written, by name.

    Raises `FileExistsError` for a file that is there.
    """
    written: dict[str, tuple[int, int]] = {}
    names = iter(contents)
    while batch := list(itertools.islice(names, _most_files())):
        written |= zip(batch, _write_batch([(folder / name, contents[name]) for name in batch]), strict=True)
    for_each(flush_folder, sorted({folder / parent for name in contents for parent in Path(name).parents}))
    return written


def _write_batch(files: Sequence[tuple[Path, Content]]) -> list[tuple[int, int]]:
    """Writes files, then flushes them. They stay open meanwhile: a file that is opened again may not be told of an
    error of the disk.
    """
    descriptors: list[int] = []
    with ExitStack() as opened:

        def write(what: tuple[Path, Content]) -> tuple[int, int]:
            file = opened.enter_context(_create(what[0]))
            descriptors.append(file.fileno())
            return _write(file, what[1])

        written = for_each(write, files)
        for_each(os.fsync, descriptors)
    return written


def _create(path: Path) -> FileIO:
    """A new file, in a folder that is made where it is missing."""
    try:
        return open(path, "xb", buffering=0)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "xb", buffering=0)


def _most_files() -> int:
    """How many files to have open at once."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _FLUSHED_TOGETHER if allowed == resource.RLIM_INFINITY else max(1, min(_FLUSHED_TOGETHER, allowed // 4))


def _write(file: FileIO, content: Content) -> tuple[int, int]:
    size, crc = 0, 0
    for part in (content.read(), memoryview(bytes(content.padding))):
        for start in range(0, len(part), _PIECE):
            piece = part[start : start + _PIECE]
            crc = zlib.crc32(piece, crc)
            rest = piece
            while rest:
                rest = rest[file.write(rest) :]
            if len(piece) == _PIECE:
                begin_writeback(file, size, _PIECE)
            size += len(piece)
    return size, crc


def begin_writeback(file: FileIO, start: int, size: int) -> None:
    """Has the disk write these bytes while the next are on their way. By itself, Linux waits for an fsync, or until a
    tenth of the memory is to be written. Does nothing on other systems.
    """
    # Python has no name for it. The advice "not needed", which has the same effect, waits for all processors.
    if _sync_file_range is not None:
        _sync_file_range(file.fileno(), start, size, _START_WRITE)
