"""Windows of bytes from text files, for a classifier and for a language model."""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meshpipe.data.batch import DataConfig
from meshpipe.data.text_files import MAX_BYTES_PER_FILE, PACKAGES, Text, folder_files, package_files, read, split
from meshpipe.errors import ArgumentError, check_whole
from meshpipe.files import expand_fields

Example = dict[str, np.ndarray]

MAX_BYTES_PER_PACKAGE = {False: 256 * 1024, True: 64 * 1024}
"""Bytes read per package, for training (False) and held out (True)."""


class LabelledWindows:
    """Consecutive windows of bytes without overlap; the label identifies the text of a window.

    Labels alternate, and each has as many windows as the shortest text.
    Fields: `inputs` int32 [seq], `labels` int32 [].
    """

    def __init__(self, texts: Sequence[Text], sequence_length: int) -> None:
        self._texts = tuple(texts)
        self._sequence_length = sequence_length
        self._windows_per_label = min(text.size for text in texts) // sequence_length

    def __len__(self) -> int:
        return len(self._texts) * self._windows_per_label

    def __getitem__(self, index: int) -> Example:
        window, label = divmod(index, len(self._texts))
        start = window * self._sequence_length
        text = self._texts[label][start : start + self._sequence_length]
        return {"inputs": text.astype(np.int32), "labels": np.asarray(label, np.int32)}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(labels={len(self._texts)}, windows={len(self)}, "
            f"sequence_length={self._sequence_length}, checksum={_checksum(self._texts)})"
        )


class PackedWindows:
    """Windows of concatenated files; every byte is the target of exactly one position.

    Fields, each [seq]: `inputs` and `targets` (the byte after each input) int32; `segment_ids` int32, different for
    each file; `weights` float32, 0 if the target is padding or in another file than its input, else 1. Only the last
    window has padding.
    """

    def __init__(self, texts: Sequence[Text], sequence_length: int) -> None:
        # A single text is not copied: it may be a memory map of a file larger than memory.
        self._text = texts[0] if len(texts) == 1 else np.concatenate(texts)
        self._ends = np.cumsum([text.size for text in texts])
        self._sequence_length = sequence_length

    def __len__(self) -> int:
        return -(-(self._text.size - 1) // self._sequence_length)

    def __getitem__(self, index: int) -> Example:
        positions = index * self._sequence_length + np.arange(self._sequence_length + 1)
        text = np.zeros(positions.size, np.int32)
        available = self._text[positions[0] : positions[0] + positions.size]
        text[: available.size] = available
        # Padding lies beyond the last end, so it counts as one more file.
        files = np.searchsorted(self._ends, positions, side="right")
        counted = (files[1:] == files[:-1]) & (files[1:] < self._ends.size)
        return {
            "inputs": text[:-1],
            "targets": text[1:],
            "segment_ids": (files[:-1] - files[0]).astype(np.int32),
            "weights": counted.astype(np.float32),
        }

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(files={self._ends.size}, bytes={self._text.size}, "
            f"sequence_length={self._sequence_length}, checksum={_checksum([self._text, self._ends])})"
        )

    def unigram_entropy(self) -> float:
        """The loss, in nats per byte, of the best prediction that uses only the frequency of each byte."""
        counts = np.bincount(self._text, minlength=256)
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())


def _checksum(arrays: Sequence[np.ndarray]) -> str:
    """A checksum at bounded cost: long arrays are sampled at about a million positions."""
    total = 0
    for array in arrays:
        sample = np.ascontiguousarray(array[:: max(1, array.size >> 20)])
        total = zlib.crc32(sample.view(np.uint8).data, zlib.crc32(str(array.size).encode(), total))
    return f"{total:08x}"


@dataclass(frozen=True, kw_only=True)
class PackageWindowsConfig(DataConfig):
    """Classifies pieces of source text by the Python package that they come from.

    The text is that of the installed packages, so other versions give other windows. About a seventh of the files of
    each package is held out.
    """

    sequence_length: int = 128
    """Bytes per window."""
    packages: tuple[str, ...] = PACKAGES
    """Packages, each of which is one class; no more than the model has classes."""

    def __post_init__(self) -> None:
        _check_sequence_length(self.sequence_length)
        if not self.packages:
            raise ArgumentError("`packages` must name at least one package. Got none.", "data")

    def train_source(self) -> LabelledWindows:
        return self._source(held_out=False)

    def eval_source(self) -> LabelledWindows:
        return self._source(held_out=True)

    def _source(self, *, held_out: bool) -> LabelledWindows:
        texts = [_package_texts(package, held_out=held_out) for package in self.packages]
        for package, text in zip(self.packages, texts, strict=True):
            what = f"the {'held-out' if held_out else 'training'} files of package {package!r}"
            _check_size(sum(part.size for part in text), self.sequence_length, what)
        return LabelledWindows([np.concatenate(text) for text in texts], self.sequence_length)


@dataclass(frozen=True, kw_only=True)
class TextFilesConfig(DataConfig):
    """Text, byte by byte: Python source that every machine has, or your own files.

    About a seventh of the files is held out. If that leaves either part without a file, as with a single file, the last
    tenth of the text is held out.
    """

    path: str | None = None
    """A text file, or a folder whose text files are used, including subfolders (but no hidden files or folders, and no
    files that contain zero bytes). A file is read on demand; a folder is held in memory. None uses the source of
    installed packages.
    """
    sequence_length: int = 128
    """Bytes that the model reads per window."""

    def __post_init__(self) -> None:
        _check_sequence_length(self.sequence_length)
        expand_fields(self, "path", section="data")

    def train_source(self) -> PackedWindows:
        return self._source(held_out=False)

    def eval_source(self) -> PackedWindows:
        return self._source(held_out=True)

    def _source(self, *, held_out: bool) -> PackedWindows:
        if self.path is None:
            packages = [package_files(package) for package in PACKAGES]
            mixed = split(itertools.chain(*packages), held_out=held_out)
            limit = len(PACKAGES) * MAX_BYTES_PER_PACKAGE[held_out]
            texts = read(mixed, max_file_bytes=MAX_BYTES_PER_FILE, max_bytes=limit)
        else:
            texts = _texts_under(Path(self.path), held_out=held_out)
        what = f"the {'held-out' if held_out else 'training'} part of {self.path}"
        _check_size(sum(text.size for text in texts), self.sequence_length + 1, what)
        return PackedWindows(texts, self.sequence_length)


def _package_texts(package: str, *, held_out: bool) -> list[Text]:
    files = split(package_files(package), held_out=held_out)
    return read(files, max_file_bytes=MAX_BYTES_PER_FILE, max_bytes=MAX_BYTES_PER_PACKAGE[held_out])


def _texts_under(path: Path, *, held_out: bool) -> list[Text]:
    if path.is_dir():
        files = folder_files(path)
        sides = {side: split(files, held_out=side) for side in (False, True)}
        if all(sides.values()):
            return read(sides[held_out])
        texts = read(sides[False] + sides[True])
        whole = np.concatenate(texts) if texts else np.empty(0, np.uint8)
    elif path.is_file():
        # An empty file cannot be mapped.
        whole = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    else:
        raise ArgumentError(
            f"`path` must name a text file or a folder of text files. Got {str(path)!r}, which is neither.", "data"
        )
    cut = whole.size * 9 // 10
    return [whole[cut:] if held_out else whole[:cut]]


def _check_sequence_length(sequence_length: int) -> None:
    check_whole("sequence_length", sequence_length, section="data")


def _check_size(size: int, needed: int, what: str) -> None:
    if size < needed:
        raise ArgumentError(
            f"There must be at least one window of text. Got {size} bytes in {what}, with windows of {needed}. "
            "Give more text, or a smaller `sequence_length`.",
            "data",
        )
