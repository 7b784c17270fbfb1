"""SIGINT, SIGTERM and SIGHUP as a request to stop after the step in progress."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from meshpipe.processes.coordination import process_count, set_key, try_get_key

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a run to stop. A closed terminal sends SIGHUP."""
STOP = "meshpipe/stop"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class StopRequest:
    """While entered, records the first signal; a later SIGINT ends the process at once.

    Before the first step there is nothing to save, so the first signal then calls `end_early`, if given, which ends the
    process. A SIGHUP that was ignored at start-up, as under `nohup`, stays ignored.

    A separate thread reads the signals: Python runs handlers only in the main thread, which may be inside a long
    compilation or waiting for a device. Enter it in the main thread.
    """

    def __init__(
        self, say: Callable[[str], None] = _say, end_early: Callable[[signal.Signals], object] | None = None
    ) -> None:
        self.end_early = end_early
        """Set this to None when steps begin."""
        self.signal: signal.Signals | None = None
        """The first signal received; None until then."""
        self.at = 0.0
        """Time of that signal, on the monotonic clock."""
        self._say = say

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """The exit code that a shell reports for a process ended by this signal: 130, 143 or 129."""
        assert self.signal is not None
        return 128 + self.signal

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        taken = [n for n in STOPPING if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        self._old_handlers = [(number, signal.signal(number, _do_nothing)) for number in taken]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        if self.end_early is not None:
            self._say(f"{received.name}: stopping; no step was run yet.")
            self.end_early(received)
        if self.signal is None:
            self.at = time.monotonic()
            self.signal = received
            self._say(f"{received.name}: stopping after the step in progress. Press Ctrl-C to end at once.")
        elif received is signal.SIGINT:
            # No clean-up, on purpose: the user wants to end now. A checkpoint being written stays unlisted.
            os._exit(128 + received)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Replaces the default action; `StopRequest` receives the signal through its socket."""


class StopTogether:
    """Makes all processes of a run stop after the same step when one receives a signal, without a barrier.

    It relies on a loop that dispatches step k + 2 only after it has read the result of step k, which requires that all
    processes have dispatched step k. So a process that gets a signal after dispatching step k can ask all to stop after
    step k + 2: no process has dispatched more by then, and every process checks before it dispatches the next.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._has_set_key = False

    def after(self, step: int) -> bool:
        """Whether `step`, the last one dispatched, is the last of the run."""
        if process_count() == 1:
            return bool(self._request)
        if self._request.signal is not None and not self._has_set_key:
            self._has_set_key = True
            with contextlib.suppress(RuntimeError):  # another process got a signal first
                set_key(STOP, f"{step + 2} {int(self._request.signal)}")
        agreed = try_get_key(STOP)
        if agreed is None:
            return False
        last, number = map(int, agreed.split())
        if self._request.signal is None:
            self._request.at = time.monotonic()
        self._request.signal = signal.Signals(number)
        return step >= last
