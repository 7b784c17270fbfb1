"""A line at the bottom of a terminal that is written anew while work goes on, and gives way to all other output."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator
from typing import Any

ERASE = "\r\x1b[2K"


class LiveLine:
    """A live line on `stream`, if that is a terminal; other output to terminals is written inside `giving_way`.

    The cursor stays visible, so a command that ends at once leaves nothing behind but the line.
    """

    def __init__(self, stream: Any) -> None:
        self._number: int | None = None
        if stream is not None and stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
            with contextlib.suppress(OSError, ValueError):  # a stream without a file
                self._number = stream.fileno()
        self._lock = threading.RLock()
        self._is_shown = False
        self._at_line_start = True

    def show(self, text: str) -> bool:
        """Writes the line anew. Returns False where it cannot: no terminal, or other output has not ended its line."""
        with self._lock:
            if self._number is None or not self._at_line_start:
                return False
            width = shutil.get_terminal_size().columns - 1
            self._is_shown = True
            self._write(ERASE + text[:width])
            return True

    def erase(self) -> None:
        with self._lock:
            if self._is_shown:
                self._is_shown = False
                self._write(ERASE)

    @contextlib.contextmanager
    def giving_way(self, text: str) -> Iterator[None]:
        """Around a write of this text to a terminal."""
        with self._lock:
            if text:
                self.erase()
                self._at_line_start = text.endswith("\n")
            yield

    def _write(self, text: str) -> None:
        assert self._number is not None
        try:
            os.write(self._number, text.encode("ascii", "replace"))
        except OSError:  # the terminal was closed
            self._number = None
