"""Text files in a fixed order, split into training files and held-out files."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from meshpipe.errors import ArgumentError

Text = UInt8[np.ndarray, " _"]
"""Bytes of one file, or of several that follow each other."""

PACKAGES = ("asyncio", "email", "encodings", "jax", "numpy", "optax", "orbax", "rich", "scipy", "xml")
"""Four packages of the standard library and six that meshpipe depends on: every machine that runs it has them."""

MAX_BYTES_PER_FILE = 32 * 1024
"""Bytes read per package file, so that no class consists mostly of one long file."""


class TextFile(NamedTuple):
    """A file and its name: a relative path with forward slashes, the same on every machine."""

    name: str
    path: Path

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.name.encode()).digest()

    @property
    def held_out(self) -> bool:
        """True for about one name in seven."""
        return self.digest[0] < 38


def split(files: Iterable[TextFile], *, held_out: bool) -> list[TextFile]:
    """The training or held-out files, ordered by the hash of their names: any first n are a fair sample."""
    return sorted((file for file in files if file.held_out == held_out), key=lambda file: file.digest)


@functools.cache
def package_files(package: str) -> tuple[TextFile, ...]:
    """All Python files of an installed package, found without importing it.

    Raises `ValueError` when there is no such package, or it is not a folder of source files.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    files = [
        TextFile(f"{package}/{path.relative_to(root).as_posix()}", path)
        for root in roots
        for path in root.rglob("*.py")
    ]
    if not files:
        raise ArgumentError(
            f"`packages` must name installed packages that are folders of Python files. Got {package!r}. "
            f"Leave it out to use {', '.join(PACKAGES)}.",
            "data",
        )
    return tuple(files)


def folder_files(root: Path) -> list[TextFile]:
    """The text files below a folder: not hidden, and without a zero byte in their first 8 KiB."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.is_file() and _is_text(path):
                files.append(TextFile(path.relative_to(root).as_posix(), path))
    return files


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(8192)
    return bool(head) and b"\0" not in head


def read(files: Iterable[TextFile], *, max_file_bytes: int = -1, max_bytes: int | None = None) -> list[Text]:
    """The bytes of the files in order, up to and including the one that reaches `max_bytes`; skips empty files.

    Reads at most `max_file_bytes` of each file; -1 reads all.
    """
    texts, size = [], 0
    for file in files:
        if max_bytes is not None and size >= max_bytes:
            break
        with file.path.open("rb") as stream:
            text = np.frombuffer(stream.read(max_file_bytes), np.uint8)
        if text.size:
            texts.append(text)
            size += text.size
    return texts
