"""Standard output and error of a command, which may go away while it runs."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


class _Lasting:
    """A stream whose failures end nothing: once it cannot be written, it is closed off, and what follows is dropped.

    A reader that has gone (`| head`), a full disk, a terminal that was closed. `say` tells about it.
    `stream` is whatever stands in the place of `sys.stdout`.
    """

    def __init__(self, stream: Any, say: Callable[[Exception], None]) -> None:
        self._stream, self._say = stream, say
        self._is_gone = False

    def write(self, text: str) -> int:
        if not self._is_gone:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:  # a terminal or file that has not all characters
                known = text.encode(error.encoding, "replace").decode(error.encoding)
                self._stream.write(known)
            except (OSError, ValueError) as error:  # ValueError: it was closed
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if not self._is_gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self, error: Exception) -> None:
        self._is_gone = True
        # What is still in its buffer goes nowhere, so that Python does not fail on it at its end.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        self._say(error)


@contextlib.contextmanager
def lasting_output(*, say: bool) -> Iterator[None]:
    """While entered, no failure to write to standard output or error is an error of whoever writes.

    With `say`, the loss of standard output is told on standard error, once.
    """
    _open_standard_files()
    before = sys.stdout, sys.stderr
    error_stream = None if sys.stderr is None else _Lasting(sys.stderr, lambda error: None)

    def tell(error: Exception) -> None:
        if say and error_stream is not None:
            why = error.strerror if isinstance(error, OSError) and error.errno != errno.EPIPE else "its reader has gone"
            error_stream.write(f"meshpipe: standard output cannot be written ({why}). The run continues without it.\n")
            error_stream.flush()

    if sys.stdout is not None:
        sys.stdout = _Lasting(sys.stdout, tell)
    sys.stderr = error_stream
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _open_standard_files() -> None:
    """Where standard input, output or error was closed by the caller, the next file to be opened would take its place,
    and get what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
