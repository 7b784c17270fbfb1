"""What a folder of prepared data holds: one JSON file, written last, without which the folder is not whole."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from meshpipe.errors import ArgumentError

NAME = "prepared.json"
FORMAT = 1
"""Changes when older versions of meshpipe could not read the folder."""
TOKENIZER_FOLDER = "tokenizer"
"""Subfolder with the files of the tokenizer."""
Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")


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
    try:
        found = json.loads(file.read_text())
        if found.get("format") != FORMAT:
            raise ArgumentError(
                f"{rule}, of format {found.get('format')!r}; this version of meshpipe reads format {FORMAT}. Prepare "
                "it again.",
                section,
            )
        manifest = _manifest(found)
    except (FileNotFoundError, NotADirectoryError):
        hint = "where it was not finished: run the same command again" if is_begun(folder) else f"without {NAME}"
        raise ArgumentError(f"{rule}, {hint}.", section) from None
    except (OSError, AttributeError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArgumentError(f"{rule}, whose {NAME} cannot be read: {error!r}. Prepare it again.", section) from error
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


def _manifest(found: dict[str, Any]) -> Manifest:
    files = {split: tuple(RecordFile(**one) for one in found["files"][split]) for split in SPLITS}
    counts = {split: Counts(**found["counts"][split]) for split in SPLITS}
    sequences = {name: tuple(found[name]) for name in ("sources", "bad_lines")}
    return Manifest(**{**found, "files": files, "counts": counts, **sequences})
