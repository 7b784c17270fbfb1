"""JSON that is read from a folder, where anybody may have written it: strict, and bounded in size and nesting."""

import json
import math
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

LARGEST_DOCUMENT = 64 << 20
"""Bytes of a document: room for half a million files."""
DEEPEST = 64
"""How many objects and arrays may be inside each other."""


class DamagedFileError(OSError):
    """A file is not as it was written; the message says how, without its name."""


def read_file(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises `DamagedFileError` where it is anything else, and
    `FileNotFoundError`.
    """
    descriptor, status = open_regular(path)
    with open(descriptor, "rb") as file:
        if status.st_size > limit:
            raise DamagedFileError(f"has {status.st_size} bytes, more than the {limit} that such a file may have")
        content = file.read(limit + 1)
    if len(content) > limit:
        raise DamagedFileError(f"grew beyond {limit} bytes while it was read")
    return content


def load_json(path: Path, limit: int = LARGEST_DOCUMENT) -> Any:
    """Reads a document. Raises `DamagedFileError`, which says why without the name of the file, for what is no JSON,
    for numbers that are not finite, for names that an object has twice, and beyond the bounds; and `FileNotFoundError`.
    """
    return parse_json(read_file(path, limit))


def parse_json(text: bytes) -> Any:
    """What `load_json` does, for text that is there."""
    try:
        value = json.loads(
            text.decode(), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_object
        )
    except RecursionError:
        raise DamagedFileError(f"is nested more than {DEEPEST} levels deep") from None
    except ValueError as error:  # also of text that is not UTF-8, and of integers with thousands of digits
        raise DamagedFileError(f"is not JSON as it should be: {_short(error)}") from None
    _check_depth(value)
    return value


def dump_json(value: Any) -> bytes:
    """A document that `load_json` reads. Raises `TypeError` or `ValueError` for what JSON cannot hold, NaN and infinity
    included, and for more than a document may be.
    """
    try:
        text = json.dumps(value, allow_nan=False).encode()
        _check_depth(value)
    except (RecursionError, DamagedFileError):
        raise ValueError(f"It is nested more than {DEEPEST} levels deep") from None
    if len(text) > LARGEST_DOCUMENT:
        raise ValueError(f"It takes {len(text)} bytes, and may take {LARGEST_DOCUMENT}")
    return text


def is_count(value: Any, limit: int = 1 << 53) -> bool:
    """Whether it is a whole number from 0 below `limit`; `True` is none."""
    return type(value) is int and 0 <= value < limit


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list | tuple) else []
    for _ in range(DEEPEST):
        inner = (part for outer in level for part in (outer.values() if isinstance(outer, dict) else outer))
        level = [part for part in inner if isinstance(part, dict | list | tuple)]
        if not level:
            return
    raise DamagedFileError(f"is nested more than {DEEPEST} levels deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r:.60} twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _short(error: Exception) -> str:
    return str(error)[:120]


def open_regular(path: Path) -> tuple[int, os.stat_result]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "is not a regular file" if _is_special(path) else f"cannot be read: {error.strerror}"
        raise DamagedFileError(what) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise DamagedFileError("is not a regular file")
    return descriptor, status


def _is_special(path: Path) -> bool:
    with suppress(OSError):
        return not stat.S_ISREG(path.lstat().st_mode)
    return False
