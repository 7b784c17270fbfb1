"""Reads slices of files: texts, JSON objects and rows, one after the other, in bounded memory."""

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from meshpipe.data.preparation.sources import UNREADABLE, Slice, open_parquet, open_source
from meshpipe.errors import ArgumentError

NEW_LINE = b"\n"
BLOCK_BYTES = 1 << 20
LINE_LIMIT = 64 << 20
"""Bytes of the longest line that is read whole."""
ROWS, ROW_BYTES = 256, 16 << 20
"""Rows of Parquet that are read at a time: at most so many, and about so many bytes."""
Progress = Callable[[float], object]
"""Is told what share of a slice has been read, 0 to 1."""


@dataclass(frozen=True)
class Record:
    """A text, or the fields of a JSON object or row; or why there is none."""

    value: str | dict[str, Any] | None
    number: int
    """Line or row of the slice, from 0."""
    begins: bool = True
    """Whether a document begins with the text; some are read in several pieces."""
    ends: bool = True
    span: tuple[int, int] | None = None
    """The bytes of a file that a piece of a text without separators is from."""
    problem: str = ""
    """Why there is no value."""


def read_records(
    part: Slice, delimiter: bytes | None, piece_bytes: int, columns: Sequence[str] | None, read: Progress
) -> Iterator[Record]:
    """The records of a slice. Texts longer than `piece_bytes` come in pieces of about that size, which end where lines
    do if possible. Rows of Parquet have these `columns`, or all. `read` is told what share of the slice has been read.
    """
    if part.file.kind == "parquet":
        yield from _rows(part, columns, read)
    elif part.file.kind == "jsonl":
        yield from _json_lines(part, read)
    else:
        yield from _texts(part, delimiter, piece_bytes, read)


def place(part: Slice, number: int, delimiter: bytes | None) -> str:
    """Where a record is, for people: `FILE, line 12`. Reads the file up to the slice, to count."""
    path = part.file.path
    if part.file.kind == "parquet":
        metadata = open_parquet(path).metadata
        before = sum(metadata.row_group(group).num_rows for group in range(part.start))
        return f"{path}, row {before + number + 1}"
    if part.file.kind == "jsonl":
        return f"{path}, line {_count_before(part, NEW_LINE) + number + 1}"
    return f"{path}" if delimiter is None else f"{path}, document {_count_before(part, delimiter) + number + 1}"


def _count_before(part: Slice, delimiter: bytes) -> int:
    count, left, kept = 0, part.start, b""
    with part.file.path.open("rb") as stream:
        while left > 0 and (block := stream.read(min(BLOCK_BYTES, left))):
            left -= len(block)
            *whole, kept = (kept + block).split(delimiter)
            count += len(whole)
    return count


def _blocks(part: Slice, read: Progress) -> Iterator[bytes]:
    """The bytes of a slice. Raises `ArgumentError` if a compressed file is damaged."""
    whole = part.stop - part.start
    left = None if part.file.compression else whole
    try:
        with open_source(part.file.path) as stream:
            if part.start:
                stream.seek(part.start)
            while block := stream.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
                if left is not None:
                    left -= len(block)
                    read(1 - left / whole)
                yield block
    except UNREADABLE as error:
        raise ArgumentError(
            f"A source must be a file that can be read. Got {str(part.file.path)!r}: {error}."
        ) from error
    if left:
        raise ArgumentError(f"A source must not change while it is read. {part.file.path} has become shorter.")


def _between(blocks: Iterator[bytes], delimiter: bytes, limit: int) -> Iterator[tuple[bytes, bool, bool]]:
    """What lies between delimiters, and whether the bytes begin and end it: more than `limit` come in pieces."""
    kept, begins = bytearray(), True
    for block in blocks:
        unsearched = max(0, len(kept) - len(delimiter) + 1)
        kept += block
        while (place := kept.find(delimiter, unsearched)) >= 0:
            unsearched = 0
            yield _taken(kept, place, len(delimiter)), begins, True
            begins = True
        while len(kept) > limit + len(delimiter):  # so that none is cut
            yield _taken(kept, _end_of_line(kept, limit)), begins, False
            begins = False
    if kept or not begins:
        yield bytes(kept), begins, True


def _taken(kept: bytearray, size: int, more: int = 0) -> bytes:
    """The first bytes, which are taken away, as are `more` after them."""
    taken = bytes(memoryview(kept)[:size])
    del kept[: size + more]
    return taken


def _end_of_line(text: bytes | bytearray, limit: int) -> int:
    """Where to cut a text of more than `limit` bytes: after a line, a word, or a character."""
    for end in (b"\n", b" "):
        place = text.rfind(end, limit // 2, limit)
        if place >= 0:
            return place + 1
    cut = limit
    while cut > limit - 4 and text[cut] & 0xC0 == 0x80:  # inside a character of UTF-8
        cut -= 1
    return cut


def _json_lines(part: Slice, read: Progress) -> Iterator[Record]:
    number = 0
    for line, begins, ends in _between(_blocks(part, read), NEW_LINE, LINE_LIMIT):
        if begins and ends:
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                yield Record(None, number, problem=f"it is not UTF-8, at byte {error.start + 1} of the line")
            else:
                del line  # may be long, as what is made of it
                record = _json_record(text, number)
                del text
                yield record
        elif begins:
            yield Record(None, number, problem=f"it has more than {LINE_LIMIT >> 20} MiB")
        number += ends


def _json_record(line: str, number: int) -> Record:
    if not line.strip():
        return Record(None, number, problem="it is empty")
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return Record(None, number, problem=f"it is not JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return Record(None, number, problem="it is not JSON that can be read: too deeply nested")
    except ValueError:  # an integer of thousands of digits
        return Record(None, number, problem="it is not JSON that can be read: a number has too many digits")
    if not isinstance(value, dict):
        return Record(None, number, problem=f"it must be a JSON object. Got {line[:40]}")
    return Record(value, number)


def _rows(part: Slice, columns: Sequence[str] | None, read: Progress) -> Iterator[Record]:
    import pyarrow

    file, number = open_parquet(part.file.path), 0
    groups = [file.metadata.row_group(group) for group in range(part.start, part.stop)]
    rows = sum(group.num_rows for group in groups)
    at_a_time = min(max(1, ROW_BYTES * rows // max(1, sum(group.total_byte_size for group in groups))), ROWS)
    try:
        for batch in file.iter_batches(at_a_time, list(range(part.start, part.stop)), columns):
            for row in batch.to_pylist():
                yield Record(row, number)
                number += 1
            read(number / rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ArgumentError(
            f"A source must be a whole Parquet file. Got {place(part, number, None)}: {error}."
        ) from error


def _texts(part: Slice, delimiter: bytes | None, piece_bytes: int, read: Progress) -> Iterator[Record]:
    blocks = _blocks(part, read)
    if delimiter is None:
        is_first, is_last = part.start == 0, bool(part.file.compression) or part.stop == part.file.size
        pieces: Iterator[tuple[bytes, bool, bool]] = (
            (text, begins and is_first, ends and is_last) for text, begins, ends in _whole(blocks, piece_bytes)
        )
    else:
        pieces = _between(blocks, delimiter, piece_bytes)
    number, start = 0, part.start
    for text, begins, ends in pieces:
        span = (start, start + len(text)) if delimiter is None else None
        start += len(text)
        try:
            is_top = begins and not number and not part.start
            decoded = (text.removeprefix(codecs.BOM_UTF8) if is_top else text).decode()
            yield Record(decoded, number, begins, ends, span)
        except UnicodeDecodeError as error:
            problem = f"it is not UTF-8 ({error.reason}). Convert it, e.g. with iconv"
            yield Record(None, number, begins, ends, problem=problem)
        number += ends


def _whole(blocks: Iterator[bytes], limit: int) -> Iterator[tuple[bytes, bool, bool]]:
    """The bytes of one document in pieces of at most `limit`, and whether they begin and end it."""
    kept, begins = bytearray(), True
    for block in blocks:
        kept += block
        while len(kept) > limit:
            yield _taken(kept, _end_of_line(kept, limit)), begins, False
            begins = False
    if kept:
        yield bytes(kept), begins, True
