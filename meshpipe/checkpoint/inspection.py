"""Looking at a folder of checkpoints without restoring anything."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshpipe.checkpoint.errors import CheckpointError
from meshpipe.checkpoint.names import CHECKPOINTS, CHECKSUMS
from meshpipe.checkpoint.reader import CheckpointReader, ProblemsError, load_step, step_problems


@dataclass(frozen=True)
class CheckpointInfo:
    """One saved step, for tables."""

    step: int
    bytes: int
    """Of all of its files."""
    saved_at: float
    """Seconds since 1970."""
    metadata: dict[str, Any]
    """What the caller of `save` said of it."""
    leaves: dict[str, dict[str, Any]]
    """For each leaf, `section/path`, its item, shape and dtype."""


def reader_of(directory: str | Path) -> CheckpointReader:
    """Reads the checkpoints of this folder, or of the run whose `run_dir` it is.

    Raises `CheckpointError` for the folder of one step, which is easily taken for the checkpoint.
    """
    reader = CheckpointReader(directory)
    inside = CheckpointReader(reader.directory / CHECKPOINTS)
    if not reader.steps() and inside.steps():
        return inside
    name, parent = reader.directory.name, reader.directory.parent
    if name.isdecimal() and int(name) in CheckpointReader(parent).steps():
        raise CheckpointError(
            f"A checkpoint is named by the folder of its run. Got {reader.directory}, a step of it. "
            f"Pass {str(parent)!r} and step {int(name)}."
        )
    return reader


def describe_checkpoint(directory: str | Path, step: int) -> CheckpointInfo:
    """What is known of a saved step without reading its arrays. `directory` is a `checkpoint_dir` or a `run_dir`.

    Raises `CheckpointError` when the step is not there or damaged, and its subclass `CheckpointGoneError` when it was
    removed meanwhile.
    """
    reader = reader_of(directory)
    with reader.reading(step) as folder:
        saved = load_step(folder, step)
        size = sum(status.st_size for status in saved.found.values())
        try:
            saved_at = (folder / CHECKSUMS).lstat().st_mtime
        except FileNotFoundError:
            raise ProblemsError({CHECKSUMS: "is missing"}) from None
    return CheckpointInfo(step, size, saved_at, saved.document["user"], saved.document["leaves"])


def list_checkpoints(directory: str | Path) -> list[int]:
    """Saved steps of a `checkpoint_dir` or `run_dir`, oldest first.

    Raises `CheckpointError` when there is no such folder or no step in it.
    """
    steps = reader_of(directory).steps()
    if not steps:
        raise CheckpointError(
            f"The folder must hold checkpoints. Got {str(directory)!r}, which "
            f"{'has none' if Path(directory).is_dir() else 'is not a folder'}. Name the folder that a run saves to."
        )
    return steps


def verify_checkpoint(directory: str | Path, step: int, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with any byte of a step, one sentence for each file; empty when all is good.

    `directory` is a `checkpoint_dir` or a `run_dir`. With a `share` of `(i, n)` only the files of reader `i` of `n` are
    read, who together read all. Raises `CheckpointError` when the step is not there, and its subclass
    `CheckpointGoneError` when it was removed meanwhile.
    """
    reader, readers = share
    folder = reader_of(directory).folder(step)
    return step_problems(folder, step, lambda name: zlib.crc32(name.encode()) % readers == reader)
