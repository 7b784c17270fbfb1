"""Writes the windows of one split of a part to an ArrayRecord file, whose name it gets when it is whole."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meshpipe.data.manifest import PARTS, Counts, RecordFile
from meshpipe.data.packing import Packer, Segment, Window, write_record
from meshpipe.errors import ArgumentError

OPTIONS = "group_size:1,zstd:3"
"""Of ArrayRecord: each record is read by itself."""


class SplitWriter:
    """Packs documents into windows and writes them to a file in `.parts`, and at the end gives it its own name."""

    def __init__(self, folder: Path, name: str, packer: Packer, dtype: np.dtype) -> None:
        self._folder, self._name = folder, name
        self._packer, self._dtype = packer, dtype
        self._writer: Any = None
        self.counts = Counts()
        self.largest_token = 0

    def add(self, text: Sequence[Segment]) -> None:
        """Takes a text, which may have been cut into segments."""
        self.counts += Counts(texts=1)
        for segment in text:
            self._write(self._packer.add(segment))

    def finish(self) -> RecordFile | None:
        """Writes what is left; the file, or None if there is nothing in it."""
        self._write(self._packer.finish())
        if self._writer is None:
            return None
        whole = self._folder / self._name
        with writing_to(self._folder):
            self._writer.close()
            sync(self._partial)
            os.replace(self._partial, whole)
            sync(self._folder)
            size, digest = whole.stat().st_size, file_digest(whole)
        return RecordFile(name=self._name, records=self.counts.windows, size=size, digest=digest)

    @property
    def _partial(self) -> Path:
        return self._folder / PARTS / self._name

    def _write(self, windows: Iterable[Window]) -> None:
        for window in windows:
            with writing_to(self._folder):
                if self._writer is None:
                    self._writer = _open(self._partial)
                self._writer.write(write_record(window, self._dtype))
            self.largest_token = max(self.largest_token, *(int(segment.tokens.max()) for segment in window))
            self.counts += Counts(
                windows=1, pairs=sum(one.pairs for one in window), targets=sum(one.targets for one in window)
            )


def _open(file: Path) -> Any:
    from array_record.python.array_record_module import ArrayRecordWriter  # what Grain reads its files with

    return ArrayRecordWriter(str(file), OPTIONS)


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """While entered, errors of writing are `ArgumentError`s: the disk is full, say. ArrayRecord has `RuntimeError`s."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ArgumentError(
            f"`to` must be a folder with room for the data. Got {str(folder)!r}: {error}. Make room and run the same "
            "command again, or name another folder."
        ) from error


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file that is whole or not there, also after a loss of power."""
    partial = file.with_name(f"{file.name}.partial")
    with writing_to(file.parent):
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
        sync(file.parent)


def file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
