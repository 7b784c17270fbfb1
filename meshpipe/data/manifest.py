"""What a folder of prepared data holds: one JSON file, written last, without which the folder is not whole."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meshpipe.documents import DamagedFileError, is_count, load_json
from meshpipe.errors import ArgumentError

NAME = "prepared.json"
FORMAT = 1
"""Changes when older versions of meshpipe could not read the folder."""
TOKENIZER_FOLDER = "tokenizer"
"""Subfolder with the files of the tokenizer."""
Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
FILE_NAME = re.compile(r"(train|eval)-\d{5}\.array_record")
LENGTH_LIMIT = 2**31
"""Windows must be shorter."""
_DTYPES = ("<u2", "<u4")


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """One ArrayRecord file of a prepared folder."""

    name: str
    records: int
    size: int
    """In bytes."""
    digest: str
    """SHA-256 of the file."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one part of the data holds, in numbers; sums of counts are counts."""

    texts: int = 0
    """Documents, or pieces of long ones."""
    windows: int = 0
    pairs: int = 0
    """Positions that are no padding."""
    targets: int = 0
    """Positions whose target counts in the loss."""

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `prepared.json`."""

    fingerprint: str
    """The same for the same tokenizer, settings, sources and records, wherever they lie."""
    inputs: str
    """The same for the same tokenizer, settings and source files, by their paths, sizes and times."""
    tokenizer: str
    """SHA-256 of the `tokenizer.json`."""
    vocab_size: int
    """One more than the largest token of the tokenizer, without tokens added to it."""
    largest_token: int
    """The largest token in the records."""
    end_token: str | None
    """The token after each document; None if there is none."""
    sequence_length: int
    """Positions of a window."""
    dtype: str
    """Of tokens in the records: `<u2` or `<u4`."""
    files: Mapping[Split, tuple[RecordFile, ...]]
    counts: Mapping[Split, Counts]
    settings: Mapping[str, Any]
    """The flags that the data depends on."""
    sources: tuple[Mapping[str, Any], ...]
    """The files that were read, and what was taken from each."""
    noticed: Mapping[str, int]
    """How many documents were left out or cut, by reason."""
    bad: int
    """Lines that could not be read and were left out."""
    bad_lines: tuple[str, ...]
    """The first of them."""
    format: int = FORMAT

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def read_manifest(folder: Path, argument: str = "path", section: str = "") -> Manifest:
    """The manifest of a prepared folder, whose files have been compared with it by their sizes.

    Raises `ArgumentError`, naming the argument, where there is none, or files are missing or of another size.
    """
    file = folder / NAME
    rule = f"`{argument}` must name a folder that `meshpipe data prepare` has written. Got {str(folder)!r}"
    if not file.exists():
        hint = "where it was not finished: run the same command again" if is_begun(folder) else f"without {NAME}"
        raise ArgumentError(f"{rule}, {hint}.", section)
    try:
        found = load_json(file.resolve())
        if isinstance(found, dict) and found.get("format") != FORMAT:
            raise ArgumentError(
                f"{rule}, of format {found.get('format')!r}; this version of meshpipe reads format {FORMAT}. Prepare "
                "it again.",
                section,
            )
        manifest = _manifest(found)
    except OSError as error:  # also damaged
        raise ArgumentError(f"{rule}, whose {NAME} {error}. Copy it again, or prepare it again.", section) from error
    for one in (one for split in SPLITS for one in manifest.files[split]):
        try:
            size = (folder / one.name).stat().st_size
        except OSError as error:
            raise ArgumentError(
                f"{rule}, whose {one.name} cannot be read: {error.strerror}. Copy it again, or prepare it again.",
                section,
            ) from error
        if size != one.size:
            raise ArgumentError(
                f"{rule}, whose {one.name} has {size:,} bytes in place of {one.size:,}. Copy it again, or prepare it "
                "again.",
                section,
            )
    return manifest


def is_begun(folder: Path) -> bool:
    """Whether a preparation of the folder began and did not end."""
    return (folder / PARTS).is_dir()


PARTS = ".parts"
"""Subfolder with what is known of finished parts, until all are."""


def _manifest(found: Any) -> Manifest:
    """Raises `DamagedFileError` for values that are not what `prepare` writes."""
    try:
        files = {split: tuple(RecordFile(**one) for one in found["files"][split]) for split in SPLITS}
        counts = {split: Counts(**found["counts"][split]) for split in SPLITS}
        sequences = {name: tuple(found[name]) for name in ("sources", "bad_lines")}
        manifest = Manifest(**{**found, "files": files, "counts": counts, **sequences})
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedFileError(f"is not as it was written: {error!r:.120}") from None
    for name, value, is_right in _checks(manifest):
        if not is_right:
            raise DamagedFileError(f"is not as it was written: its {name} is {value!r:.120}")
    return manifest


def _checks(found: Manifest) -> Iterator[tuple[str, object, bool]]:
    """Names of fields, their values, and whether they can be."""
    for name in ("fingerprint", "inputs", "tokenizer"):
        yield name, (value := getattr(found, name)), isinstance(value, str)
    for name in ("vocab_size", "largest_token", "bad"):
        yield name, (value := getattr(found, name)), is_count(value, LENGTH_LIMIT)
    yield "end_token", found.end_token, found.end_token is None or isinstance(found.end_token, str)
    length = found.sequence_length
    yield "sequence_length", length, is_count(length, LENGTH_LIMIT) and length > 0
    yield "dtype", found.dtype, found.dtype in _DTYPES
    for split in SPLITS:
        counts, files = found.counts[split], found.files[split]
        yield f"counts of {split}", counts, all(map(is_count, asdict(counts).values()))
        for file in files:
            yield "file", file, _is_file(file)
        records = sum(file.records for file in files)
        yield f"number of records of {split}", records, records == counts.windows
    settings = found.settings
    yield "settings", settings, isinstance(settings, dict) and {"chat_template", "packing"} <= settings.keys()
    for source in found.sources:
        yield "source", source, isinstance(source, dict) and is_count(source.get("size"))
    noticed = found.noticed
    yield "noticed", noticed, isinstance(noticed, dict) and all(map(is_count, noticed.values()))
    lines = found.bad_lines
    yield "bad_lines", lines, all(isinstance(line, str) for line in lines) and bool(lines) == (found.bad > 0)


def _is_file(file: RecordFile) -> bool:
    """Whether it is in the folder itself, and may have so many records: each has more than one byte."""
    return (
        isinstance(file.name, str)
        and FILE_NAME.fullmatch(file.name) is not None
        and is_count(file.size)
        and is_count(file.records, file.size)
        and isinstance(file.digest, str)
    )
