"""What could make a save fail, found before there is anything to save."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from meshpipe.checkpoint.errors import CheckpointError
from meshpipe.checkpoint.index import Index, Tree, index_bytes, index_leaves
from meshpipe.checkpoint.names import MAX_NAME
from meshpipe.checkpoint.shards import leaf_files
from meshpipe.files import missing_folders, remove_empty
from meshpipe.machine import format_bytes

_MAX_STEP = 16
"""Digits of a step, with room."""


def index_shapes(shapes: Sequence[Tree], directory: Path) -> Index:
    """Where the leaves of these shapes would be saved. Raises `CheckpointError` for leaves that cannot be."""
    nearest = nearest_folder(directory)
    index, _ = index_leaves(None, shapes, _limit(nearest, "PC_NAME_MAX", MAX_NAME))
    longest = max((len(f"{leaf['item']}/{key}".encode()) for key, leaf in index.items()), default=0)
    path = len(str(directory).encode()) + _MAX_STEP + longest + 64
    if path > (limit := _limit(nearest, "PC_PATH_MAX", 4096)):
        raise CheckpointError(
            f"The path of a file of a checkpoint must have at most {limit} bytes. Got up to {path} in {directory}. "
            "Save into a folder with a shorter path."
        )
    return index


def check_space(index: Index, directory: Path) -> None:
    """Raises `CheckpointError` when the disk has no room for the bytes and files of one checkpoint."""
    size, files = (
        index_bytes(index),
        sum(1 for leaf in index.values() if 0 not in leaf["shape"] for _ in leaf_files(leaf)),
    )
    nearest = nearest_folder(directory)
    free = shutil.disk_usage(nearest).free
    if size > free:
        raise CheckpointError(
            f"The disk must have room for one checkpoint at least, which takes {format_bytes(size)}. {directory} has "
            f"{format_bytes(free)} left. Make room, or save into another folder."
        )
    status = os.statvfs(nearest)
    if status.f_files and files > status.f_favail:
        raise CheckpointError(
            f"The disk must have room for the {files} files of one checkpoint. {directory} may have {status.f_favail} "
            "more. Remove files, or save into another folder."
        )


def make_writable(directory: Path) -> list[Path]:
    """Makes the folder if it is missing; returns the folders that it made, the innermost first.

    Raises `CheckpointError` where nothing can be written; then what it made is gone again.
    """
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"Checkpoints are saved in a folder. Got {directory}, a file. Name another.")
    made = missing_folders(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        remove_empty(made)
        raise CheckpointError(
            f"Checkpoints need a folder that can be made. Got {directory}: {error.strerror}. Name another folder."
        ) from error
    return made


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))


def _limit(folder: Path, name: str, usual: int) -> int:
    try:
        return os.pathconf(folder, name)
    except (OSError, ValueError):
        return usual
