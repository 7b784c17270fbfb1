"""The metrics of a run while it trains: a file of JSON lines."""

import errno
import json
import math
import os
import sys
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from meshpipe.errors import ArgumentError
from meshpipe.files import check_file
from meshpipe.runs.warning import Warnings

MAX_LINE = 1 << 20
"""Upper limit of the length of a metrics line, in bytes; real lines are far shorter."""


class MetricsFile:
    """One JSON object per line, unbuffered. With a path of None, nothing is written.

    Non-finite numbers become null, since JSON has none. A line that cannot be written (e.g. on a full disk) is left out
    entirely, with one warning on standard error; later lines are tried again.
    """

    def __init__(self, path: str | Path | None, *, append: bool = False) -> None:
        self._path, self._warnings = path, Warnings()
        self._file: FileIO | None = None
        if path is not None:
            if append:
                _cut_torn_line(Path(path))
            self._file = _open(Path(path), append)

    @staticmethod
    def check(path: str | Path | None, *, append: bool = False) -> None:
        """Raises `ValueError` when the file cannot be written or holds another run. Writes nothing."""
        if path is None:
            return
        path = Path(path)
        check_file("metrics", path)
        if path.exists() and not path.is_file():
            return  # a pipe or /dev/stdout, which cannot hold an earlier run
        if not append and path.exists() and path.stat().st_size:
            raise ArgumentError(
                f"`metrics` must name a new file, so that two runs do not mix. Got {str(path)!r}, which is not empty. "
                "Name another file, remove it, or resume its run with `resume`."
            )

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            line = json.dumps({"event": event} | _finite(values), allow_nan=False)
            try:
                _write_whole(self._file, line.encode() + b"\n")
            except OSError as error:
                self._warnings.say_once(
                    "metrics",
                    f"a line of the metrics file {self._path} could not be written: {error.strerror}. "
                    "The run continues; the lines that cannot be written are missing.",
                )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open(path: Path, append: bool) -> FileIO:
    if not path.is_fifo():
        return open(path, "ab" if append else "wb", buffering=0)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(descriptor, True)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        print(f"meshpipe: waiting for a program that reads the pipe {path}.", file=sys.stderr, flush=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    return FileIO(descriptor, "wb")


def _write_whole(file: FileIO, line: bytes) -> None:
    """Writes a whole line; on an error, truncates a partial line if the file is seekable. Raises `OSError`."""
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        written = len(line) - len(rest)
        if written and file.seekable():
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size - written)
            file.seek(0, os.SEEK_END)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    """Removes an unterminated last line, which a killed run or a full disk can leave."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        start = max(0, file.seek(0, os.SEEK_END) - MAX_LINE)
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)
