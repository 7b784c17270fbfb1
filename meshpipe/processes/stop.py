"""SIGINT, SIGTERM and SIGHUP as a request to stop: at once before the first step, and later after the step in progress.

This module imports little, so that a command can listen for signals before it imports JAX, which takes seconds.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a run to stop. A closed terminal sends SIGHUP."""
SECONDS_TO_END = 1.75
"""An early stop ends the process after this long at the latest, even if nobody reads its output."""
RESTORE = b"\r\x1b[2K\x1b[?25h"
"""Erases a live line on a terminal, and shows the cursor, which the line hides."""


@contextlib.contextmanager
def keeping_handlers() -> Iterator[None]:
    """Installs the handlers of STOPPING again that Python knows, after what may have replaced them: libtpu ignores
    SIGHUP from its start on, and so would every process that is started later.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:
                    signal.signal(number, handler)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def leave_now(received: signal.Signals) -> NoReturn:
    """Ends the process as a signal asks before there is anything to save."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    exit_now(128 + received)


def exit_now(status: int) -> NoReturn:
    """Ends the process without any clean-up but that of its terminal."""
    if os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        with contextlib.suppress(OSError):
            terminal = next((number for number in (1, 2) if os.isatty(number)), None)
            if terminal is not None:
                os.write(terminal, RESTORE)
    os._exit(status)


class StopRequest:
    """While entered, records the first signal; a later SIGINT ends the process at once.

    Before the first step there is nothing to save, so the first signal then prints `early` and calls `end_early`, if
    given, which ends the process; any second signal ends it at once. A SIGHUP that was ignored at start-up, as under
    `nohup`, stays ignored.

    A separate thread reads the signals: Python runs handlers only in the main thread, which may be inside a long
    compilation or waiting for a device. Where even that thread does not get to run, as when memory has run out, the
    operating system ends the process at the second SIGINT. Outside of the main thread, no signal is taken.
    """

    def __init__(
        self,
        say: Callable[[str], None] = _say,
        end_early: Callable[[signal.Signals], object] | None = None,
        early: str = "stopped.",
    ) -> None:
        self.end_early = end_early
        self.signal: signal.Signals | None = None
        """The first signal received; None until then."""
        self.at = 0.0
        """Time of that signal, on the monotonic clock."""
        self._say, self._early = say, early
        self._is_ending = False
        self._in_progress = "the step in progress"
        self._once = [_OneTimeHandler(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """The exit code that a shell reports for a process ended by this signal: 130, 143 or 129."""
        assert self.signal is not None
        return 128 + self.signal

    def __enter__(self) -> "StopRequest":
        self._old_handlers = []
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        taken = [n for n in STOPPING if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        self._old_handlers = [(number, signal.signal(number, _do_nothing)) for number in taken]
        for handler in self._once:
            handler.arm()
        return self

    def begin_steps(self, in_progress: str = "the step in progress") -> None:
        """From now on, the first signal lets what is in progress finish, and only SIGINT ends the process at once."""
        self.end_early, self._in_progress = None, in_progress
        for handler in self._once:
            if handler.number != signal.SIGINT:
                handler.keep()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._old_handlers:
            return
        for number, handler in self._old_handlers:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        self._writer.close()
        self._thread.join()
        self._reader.close()

    def _watch(self) -> None:
        while received := self._reader.recv(16):
            for number in received:
                if number in STOPPING:
                    self._note(signal.Signals(number))

    def _note(self, received: signal.Signals) -> None:
        if self._is_ending:
            exit_now(128 + received)
        is_first = self.signal is None
        if is_first:
            self.at = time.monotonic()
            self.signal = received
        if self.end_early is not None:
            self._is_ending = True
            threading.Thread(target=self._end, args=(received, self.end_early), name="end", daemon=True).start()
        elif is_first:
            self._once[0].arm()
            self._say(f"{received.name}: stopping after {self._in_progress}. Press Ctrl-C to end at once.")
        elif received is signal.SIGINT:
            # No clean-up, on purpose: the user wants to end now. A checkpoint being written stays unlisted.
            exit_now(128 + received)

    def _end(self, received: signal.Signals, end_early: Callable[[signal.Signals], object]) -> None:
        """Ends early, in time even if a full pipe or a lost connection blocks what comes before the end."""
        limit = threading.Timer(SECONDS_TO_END, os._exit, (128 + received,))
        limit.daemon = True
        limit.start()
        self._say(f"{received.name}: {self._early}")
        end_early(received)
        limit.cancel()


class _OneTimeHandler:
    """Keeps Python's handler of a signal for one delivery; at the next, the operating system ends the process.

    It has an effect only with glibc, and only once Python has installed its handler.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.number = number
        self._handler: int | None = None

    def arm(self) -> None:
        """To be called anew after each delivery."""
        library = ctypes.CDLL(None)
        if not hasattr(library, "sysv_signal"):
            return
        if self._handler is None:
            self._handler = _set_handler(library.signal, self.number, signal.SIG_DFL)
        _set_handler(library.sysv_signal, self.number, self._handler)

    def keep(self) -> None:
        """Keeps the handler for all deliveries to come."""
        if self._handler is not None:
            _set_handler(ctypes.CDLL(None).signal, self.number, self._handler)


def _set_handler(function: Any, number: int, handler: int | None) -> int | None:
    """Calls `signal` or `sysv_signal` of the C library, and returns the address of the handler before."""
    function.argtypes, function.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = function(number, handler)
    return None if before is None else int(before)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Replaces the default action; `StopRequest` receives the signal through its socket."""
