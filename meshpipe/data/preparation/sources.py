"""The files of the sources, and the parts that they are prepared in."""

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from meshpipe.data.preparation.config import Format
from meshpipe.data.text_files import folder_files
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded

Kind = Literal["text", "jsonl", "parquet"]
SUFFIXES: dict[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COMPRESSED: Mapping[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""By suffix, what opens such files."""
UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)
"""What reading a file raises that is damaged, or may not be read."""
UNPACK = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
"""By suffix, the program that unpacks such files."""
UNKNOWN = (".zst", ".zip", ".tar", ".7z", ".lz4", ".arrow")
"""Suffixes of files that are not text, and cannot be read."""
SEARCH_BYTES = 1 << 20


@dataclass(frozen=True)
class SourceFile:
    """A file to read."""

    path: Path
    kind: Kind
    size: int
    modified: int
    """When it was changed last, in nanoseconds."""

    @property
    def compression(self) -> str:
        return self.path.suffix if self.path.suffix in COMPRESSED else ""


@dataclass(frozen=True)
class Slice:
    """A run of a file: bytes from the start of a document to the start of another, or row groups of Parquet.

    A compressed file has one slice, from 0 to its end.
    """

    file: SourceFile
    start: int
    stop: int
    size: int
    """Bytes on disk, about."""

    def key(self) -> list[Any]:
        """What it is read from, as JSON values; differs if the file has changed."""
        return [str(self.file.path), self.file.kind, self.file.size, self.file.modified, self.start, self.stop]


@dataclass(frozen=True)
class Part:
    """Slices that are prepared together, independently of all other parts."""

    number: int
    slices: tuple[Slice, ...]
    held_out: bool
    """Whether all of it is held out."""

    @property
    def size(self) -> int:
        return sum(one.size for one in self.slices)


@dataclass(frozen=True)
class Found:
    """The files of the sources, and those in folders that are not read: of another kind, or empty."""

    files: tuple[SourceFile, ...]
    others: tuple[Path, ...]


def find_files(sources: Sequence[str], kind: Format, argument: str, to: Path) -> Found:
    """The files of the sources in a fixed order: those of a folder by their names. Of a folder with JSON lines or
    Parquet, only those are read. What lies in `to`, which may be in one of the sources, is none.

    Raises `ArgumentError` for a source that is neither file nor folder, is empty, or is of a kind that is not read.
    """
    found: list[SourceFile] = []
    others: list[Path] = []
    for source in sources:
        path = expanded("sources", source)
        if path.is_dir():
            inside, every = sorted(_outside(to, set(_inside(path)))), sorted(_outside(to, _every(path)))
            data = [one for one in inside if _kind(one) in (("jsonl", "parquet") if kind == "auto" else (kind,))]
            if not inside:
                got = f"which has none; {every[0].name!r} cannot be read" if every else "which has none"
                raise ArgumentError(
                    f"{argument} must have files of text, JSON lines or Parquet. Got the folder {source!r}, {got}."
                )
            found += [_file(one, kind, argument) for one in data or inside]
            others += sorted({*every} - {*(data or inside)})
        elif path.is_file():
            found.append(_file(path, kind, argument))
        else:
            raise ArgumentError(f"{argument} must be files or folders. Got {source!r}, which is neither.")
    return Found(tuple(found), tuple(others))


def _inside(folder: Path) -> Iterator[Path]:
    """Files of a folder that are text by their contents, or of a kind known by its suffix; none that is hidden."""
    yield from (file.path for file in folder_files(folder))
    yield from (path for path in _every(folder) if path.suffix in (*COMPRESSED, ".parquet"))


def _outside(folder: Path, paths: Iterable[Path]) -> Iterator[Path]:
    return (path for path in paths if not path.absolute().is_relative_to(folder))


def _every(folder: Path) -> Iterator[Path]:
    """All files of a folder that are not hidden."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (path for name in names if not name.startswith(".") and (path := Path(root, name)).is_file())


def _kind(path: Path) -> Kind:
    """What a file is by its name."""
    inner = path.with_suffix("") if path.suffix in COMPRESSED else path
    return SUFFIXES.get(inner.suffix, "text")


def _file(path: Path, kind: Format, argument: str) -> SourceFile:
    try:
        status = path.stat()
        with open_source(path) as file:
            head = file.read(4096)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise ArgumentError(f"{argument} must be files that can be read. Got {str(path)!r}: {reason}.") from error
    if not head:
        raise ArgumentError(f"{argument} must have text. Got {str(path)!r}, which is empty.")
    if path.suffix in UNKNOWN:
        raise ArgumentError(
            f"{argument} must be text, JSON lines or Parquet, plain or as {', '.join(COMPRESSED)}. Got {str(path)!r}. "
            + (f"Unpack it: zstd -d {path.name}" if path.suffix == ".zst" else "Unpack or convert it.")
        )
    found = _kind(path) if kind == "auto" else kind
    named = path.with_suffix("") if path.suffix in COMPRESSED else path
    if kind == "auto" and named.suffix == ".json" and head.lstrip().startswith((b"{", b"[")):
        found = "jsonl"  # many files of JSON lines are named so
    if found == "parquet" and path.suffix in COMPRESSED:
        raise ArgumentError(f"{argument} must be Parquet as it is. Got {str(path)!r}. Unpack it.")
    if found == "parquet" and not head.startswith(b"PAR1"):
        raise ArgumentError(f"{argument} must be Parquet where named so. Got {str(path)!r}, which is not.")
    if found == "text" and b"\0" in head:
        raise ArgumentError(f"{argument} must be text. Got {str(path)!r}, which has bytes of zero.")
    if found == "jsonl" and head.lstrip().startswith(b"["):
        lines = named.with_suffix(".jsonl").name
        lines = lines if lines != path.name else f"{path.stem}.lines.jsonl"  # the shell would empty what jq reads
        packed = path.suffix in COMPRESSED
        convert = f"{UNPACK[path.suffix]} -dc {path.name} | jq -c '.[]'" if packed else f"jq -c '.[]' {path.name}"
        raise ArgumentError(
            f"{argument} must have one JSON object per line. Got {str(path)!r}, which begins with a list. Convert it: "
            f"{convert} > {lines}"
        )
    return SourceFile(path, found, status.st_size, status.st_mtime_ns)


def open_source(path: Path) -> Any:
    """The bytes of a file, unpacked where it is compressed."""
    return COMPRESSED.get(path.suffix, open)(path, "rb")


def make_parts(
    files: Sequence[SourceFile], eval_files: Sequence[SourceFile], part_bytes: int, delimiter: bytes | None
) -> list[Part]:
    """Cuts the files into parts of about `part_bytes`."""
    grouped = []
    for group, held_out in ((files, False), (eval_files, True)):
        now: list[Slice] = []
        for one in (one for file in group for one in _slices(file, part_bytes, delimiter)):
            if now and sum(other.size for other in now) + one.size > part_bytes:
                grouped.append((now, held_out))
                now = []
            now.append(one)
        if now:
            grouped.append((now, held_out))
    return [Part(number, tuple(slices), held_out) for number, (slices, held_out) in enumerate(grouped)]


def _slices(file: SourceFile, part_bytes: int, delimiter: bytes | None) -> Iterator[Slice]:
    if file.kind == "parquet":
        yield from _row_groups(file, part_bytes)
    elif file.compression or file.size <= part_bytes:
        yield Slice(file, 0, file.size, file.size)
    else:
        between = b"\n" if file.kind == "jsonl" or delimiter is None else delimiter
        bounds = [0]
        while bounds[-1] < file.size:
            bounds.append(_next_document(file, bounds[-1] + part_bytes, between))
        yield from (Slice(file, start, stop, stop - start) for start, stop in pairwise(bounds))


def _next_document(file: SourceFile, start: int, delimiter: bytes) -> int:
    """The byte after the first delimiter from `start` on, or the size of the file."""
    with file.path.open("rb") as stream:
        stream.seek(start)
        kept = b""
        while block := stream.read(SEARCH_BYTES):
            text = kept + block
            if (place := text.find(delimiter)) >= 0:
                return start + place + len(delimiter)
            kept = text[len(text) - len(delimiter) + 1 :]
            start += len(text) - len(kept)
    return file.size


def _row_groups(file: SourceFile, part_bytes: int) -> Iterator[Slice]:
    metadata = open_parquet(file.path).metadata
    share = file.size / max(1, metadata.num_row_groups)
    count = max(1, int(part_bytes // max(1.0, share)))
    for start in range(0, metadata.num_row_groups, count):
        stop = min(start + count, metadata.num_row_groups)
        yield Slice(file, start, stop, int(share * (stop - start)))


def open_parquet(path: Path) -> Any:
    """The file, as `pyarrow.parquet` reads it. Raises `ArgumentError` if it is damaged, and without pyarrow."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ArgumentError(
            "Parquet is read by pyarrow. It is not installed. Install it: pip install 'meshpipe[tokens]'."
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ArgumentError(f"A source must be a whole Parquet file. Got {str(path)!r}: {error}.") from error
