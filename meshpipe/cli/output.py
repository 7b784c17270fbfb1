"""Standard output and error of a command, which may become unwritable while it runs."""

import contextlib
import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from meshpipe.report.live_line import LiveLine

OWN = "meshpipe"
"""How messages on standard error begin."""


class _Lasting:
    """A stream that never raises: after a write fails, `say` is called once and later output is dropped.

    Writes fail when the reader has exited (`| head`), the disk is full or the terminal was closed. On a terminal, lines
    of messages of meshpipe end between words; elsewhere, each is one line.
    `stream` is the current `sys.stdout` or its replacement, and `line` what is to give way if it is a terminal.
    """

    def __init__(self, stream: Any, say: Callable[[Exception], None], line: LiveLine) -> None:
        self._stream, self._say = stream, say
        self._line = line if stream.isatty() else None
        self.lost_by: Exception | None = None
        """Why output is dropped; None while it is written."""

    def write(self, text: str) -> int:
        if self.lost_by is None:
            try:
                if self._line is None:
                    self._write(text)
                else:
                    with self._line.giving_way(text):
                        self._write(_between_words(text) if text.startswith(OWN) else text)
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._give_up(error)
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:  # the encoding of the terminal or file lacks a character
            known = text.encode(error.encoding, "replace").decode(error.encoding)
            self._stream.write(known)

    def flush(self) -> None:
        if self.lost_by is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: Exception) -> None:
        self.lost_by = error
        # Redirect its buffered output to /dev/null, so that Python does not fail to flush it at exit.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._say(error)


def reader_is_gone(error: Exception | None) -> bool:
    """Whether an error of writing says that nobody reads any more."""
    return error is not None and (not isinstance(error, OSError) or error.errno == errno.EPIPE)


def loss_of_output() -> Exception | None:
    """Why standard output is dropped; None while it is written."""
    found: Exception | None = getattr(sys.stdout, "lost_by", None)
    return found


def _between_words(text: str) -> str:
    width = shutil.get_terminal_size().columns

    def broken(line: str) -> str:
        return "\n".join(textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)) or line

    return "\n".join(broken(line) if len(line) > width else line for line in text.split("\n"))


@contextlib.contextmanager
def lasting_output(*, say: bool) -> Iterator[LiveLine]:
    """While entered, writes to standard output and error never raise. The live line is on standard output with `say`,
    and else on standard error.

    One message on standard error reports the loss of standard output; without `say`, not of one whose reader is gone.
    """
    _open_standard_files()
    before = sys.stdout, sys.stderr
    line = LiveLine(sys.stdout if say else sys.stderr)
    error_stream = None if sys.stderr is None else _Lasting(sys.stderr, lambda error: None, line)

    def report(error: Exception) -> None:
        if error_stream is not None and (say or not reader_is_gone(error)):
            why = "its reader is gone" if reader_is_gone(error) else getattr(error, "strerror", error)
            rest = "The run continues without it." if say else "The rest of it is lost."
            error_stream.write(f"meshpipe: standard output cannot be written ({why}). {rest}\n")
            error_stream.flush()

    if sys.stdout is not None:
        sys.stdout = _Lasting(sys.stdout, report, line)
    sys.stderr = error_stream
    try:
        yield line
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _open_standard_files() -> None:
    """Opens /dev/null for each standard stream that the caller has closed. Otherwise the next file opened would take
    its descriptor, and receive the output of libraries.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
