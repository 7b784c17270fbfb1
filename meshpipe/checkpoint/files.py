"""Files of a checkpoint: read with a bound, their checksums taken on the way, and removed.

Nothing that is read is trusted: links are not followed, and what is no regular file is refused before it is read, so
that a pipe or a device neither blocks nor feeds the reader without end.
"""

import errno
import fcntl
import os
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TypeVar

import numpy as np

from meshpipe.documents import DamagedFileError, open_regular

THREADS = 4
"""Files that are written or read at once: disks serve several requests faster than one, and system calls and CRCs
release the interpreter's lock. More threads only wait for that lock.
"""
_PAGE = 4096
"""Bytes to which memory, place and size of a direct read must be aligned, on any disk."""
_PIECE = 1 << 20
"""Bytes of a read, so few that what was read is still in the processor's cache for the CRC."""
_FIRST_PIECE = 16 << 10
_DIRECT_PIECE = 4 << 20
"""Bytes of a direct read, as many as a disk takes at once."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def read_checked(path: Path, expected: tuple[int, int], into: memoryview | None = None) -> None:
    """Reads a file into a buffer of its size, or into none, and compares size and CRC-32 with the expected ones on the
    way. Raises `DamagedFileError` where they differ, and `FileNotFoundError`.

    Into a buffer that begins with a page, the disk writes directly, past the page cache.
    """
    size, crc = expected
    descriptor, status = open_regular(path)
    with open(descriptor, "rb", buffering=0) as file:
        if status.st_size != size:
            raise DamagedFileError(f"has {status.st_size} bytes instead of {size}")
        assert into is None or len(into) == size
        found = done = 0
        if into is not None and size >= _PIECE and _starts_page(into) and _set_direct(descriptor, True):
            found, done = _read_directly(file, into[: size - size % _PAGE])
            _set_direct(descriptor, False)
        scratch = memoryview(bytearray(min(_PIECE, size))) if into is None else into
        while done < size:
            start = 0 if into is None else done
            # The kernel reads ahead a multiple of what was read before, and more cheaply the more it is: so it begins
            # with little, and a file of 2 MiB takes half as long.
            piece = scratch[start : start + min(_PIECE, max(_FIRST_PIECE, done), size - done)]
            count = file.readinto(piece)
            if not count:
                raise DamagedFileError(f"ended after {done} bytes instead of {size}")
            found, done = zlib.crc32(piece[:count], found), done + count
    if found != crc:
        raise DamagedFileError("has changed bytes")


def _read_directly(file: FileIO, into: memoryview) -> tuple[int, int]:
    """Reads the beginning of a file; the CRC-32 and the number of the bytes that were read, which are fewer than asked
    for where the file system does not read everything so.
    """
    crc = done = 0
    while done < len(into):
        piece = into[done : done + _DIRECT_PIECE]
        try:
            count = file.readinto(piece)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break
        crc, done = zlib.crc32(piece[:count], crc), done + count
        if count < len(piece):
            break
    return crc, done


def _starts_page(buffer: memoryview) -> bool:
    return np.frombuffer(buffer, np.uint8).ctypes.data % _PAGE == 0


def _set_direct(descriptor: int, direct: bool) -> bool:
    """Whether the file system lets its files be read past the page cache, if they are to be."""
    if sys.platform != "linux":
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes whatever has this name: a folder with all that is in it, a file, or a link but not what it leads to."""
    try:
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return


def for_each(
    function: Callable[[_Item], _Result], items: Sequence[_Item], name: str = "files", threads: int = THREADS
) -> list[_Result]:
    """Calls the function for several items at a time; the results in order."""
    if len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(threads, len(items)), name) as executor:
        return list(executor.map(function, items))


def below(folder: Path) -> dict[str, os.stat_result]:
    """Name and status of everything in a folder and the folders in it, these themselves left out; links are not
    followed. What vanishes meanwhile is left out.
    """
    found: dict[str, os.stat_result] = {}
    folders = [""]
    while folders:
        at = folders.pop()
        with suppress(FileNotFoundError), os.scandir(folder / at) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(f"{at}{entry.name}/")
                    else:
                        found[at + entry.name] = entry.stat(follow_symlinks=False)
    return found
