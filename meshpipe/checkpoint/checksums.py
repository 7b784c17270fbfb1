"""Sizes and checksums of the files of a step: the list of them, and what differs from it.

CRC-32 finds every burst of up to 32 flipped bits and misses other damage once in four billion times, at several times
the speed of a disk; it protects against accidents, not against forgery.
"""

import json
import os
import stat
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meshpipe.checkpoint.contents import Content, write_files
from meshpipe.checkpoint.files import for_each, read_checked
from meshpipe.checkpoint.names import CHECKSUMS
from meshpipe.documents import LARGEST_DOCUMENT, DamagedFileError, is_count, load_json

Checksums = Mapping[str, tuple[int, int]]
"""Size and CRC-32 of every file, by its name in the folder."""


def write_list(folder: Path, files: Checksums) -> None:
    """Writes what the files of the folder have to be into it, with a CRC of its own, through to the disk."""
    text = json.dumps({"files": files, "crc32": _crc(files)}).encode()
    if len(text) > LARGEST_DOCUMENT:
        raise OSError(f"the list of {len(files)} files takes {len(text)} bytes, and may take {LARGEST_DOCUMENT}")
    write_files(folder, {CHECKSUMS: Content(text)})


def load_list(folder: Path) -> dict[str, tuple[int, int]]:
    """The list of a folder. Raises `DamagedFileError` where it is not as `write_list` writes it, and
    `FileNotFoundError`.
    """
    saved = load_json(folder / CHECKSUMS)
    if not (isinstance(saved, dict) and is_list(saved.get("files"))):
        raise DamagedFileError("is no list of sizes and checksums")
    if saved.get("crc32") != _crc(saved["files"]):
        raise DamagedFileError("has changed bytes")
    return {name: (size, crc) for name, (size, crc) in saved["files"].items()}


def is_list(files: Any) -> bool:
    """Whether data from a file gives a size and a CRC-32 for each name."""
    return isinstance(files, dict) and all(
        isinstance(entry, list) and len(entry) == 2 and is_count(entry[0], 1 << 63) and is_count(entry[1], 1 << 32)
        for entry in files.values()
    )


def size_differences(
    found: Mapping[str, os.stat_result], files: Checksums, concerns: Callable[[str], bool] = lambda name: True
) -> dict[str, str]:
    """What is wrong with the files for whose name `concerns` is true, e.g. `{"a/b": "is missing"}`, without opening
    them; `found` is what is `below` the folder.
    """
    problems = {name: "is missing" for name in files if name not in found and concerns(name)}
    for name, status in found.items():
        if name == CHECKSUMS or not concerns(name):
            continue
        if name not in files:
            problems[name] = "is not part of the checkpoint"
        elif not stat.S_ISREG(status.st_mode):
            problems[name] = "is not a regular file"
        elif status.st_size != files[name][0]:
            problems[name] = f"has {status.st_size} bytes instead of {files[name][0]}"
    return problems


def differences(
    folder: Path,
    found: Mapping[str, os.stat_result],
    files: Checksums,
    concerns: Callable[[str], bool] = lambda name: True,
) -> dict[str, str]:
    """What is wrong with the files for whose name `concerns` is true; empty when every byte of them is good.

    Names in the list are compared with what was `found` below the folder, so that they cannot lead out of it.
    """
    problems = size_differences(found, files, concerns)
    names = [name for name in files if concerns(name) and name not in problems]
    contents = for_each(lambda name: file_problem(folder, name, files[name]), names, "checksums")
    problems |= {name: problem for name, problem in zip(names, contents, strict=True) if problem}
    return dict(sorted(problems.items()))


def file_problem(folder: Path, name: str, expected: tuple[int, int], into: memoryview | None = None) -> str | None:
    """Reads a file, into a buffer where one is given; what is wrong with it, or None."""
    try:
        read_checked(folder / name, expected, into)
    except FileNotFoundError:
        return "is missing"
    except DamagedFileError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _crc(files: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())
