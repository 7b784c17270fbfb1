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
"""Signals that ask a run to stop. SIGHUP comes when a terminal is closed."""
STOP = "meshpipe/stop"


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class StopRequest:
    """While entered, the first of the signals is only noted, and a SIGINT after it ends the process at once.

    Until the first step, when there is nothing to save, the first signal ends the process by `end_early`, where given.
    A SIGHUP that the process was started to ignore, as by `nohup`, stays ignored.

    Signals are read by a thread of their own: Python runs handlers in the main thread alone, which may be inside a long
    compilation or waiting for a device. Enter it in the main thread.
    """

    def __init__(
        self, say: Callable[[str], None] = _say, end_early: Callable[[signal.Signals], object] | None = None
    ) -> None:
        self.end_early = end_early
        """To be taken away when steps begin."""
        self.signal: signal.Signals | None = None
        """The first one received; None until then."""
        self.at = 0.0
        """When, by the monotonic clock."""
        self._say = say

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """What a shell reports of a process that this signal ended: 130, 143 or 129."""
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
            self._say(f"{received.name}: stopping; nothing was trained yet.")
            self.end_early(received)
        if self.signal is None:
            self.at = time.monotonic()
            self.signal = received
            self._say(f"{received.name}: stopping after the step in progress. Press Ctrl-C to end at once.")
        elif received is signal.SIGINT:
            # Nothing is cleaned up, which is what was asked for: a checkpoint being written stays unlisted.
            os._exit(128 + received)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Takes the place of the default action; `StopRequest` has seen the signal already."""


class StopTogether:
    """Lets all processes of a run stop after the same step when one of them is asked to, without a barrier.

    It relies on a loop that hands over a step only after it has read the result of the step before the last, which
    needs all processes to have handed over that one. So whoever is asked after handing over step k can let all stop
    after step k + 2: nobody has handed over more by then, and everybody looks before handing over the next.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._has_told = False

    def after(self, step: int) -> bool:
        """Whether `step`, the last that was handed over, is the last of the run."""
        if process_count() == 1:
            return bool(self._request)
        if self._request.signal is not None and not self._has_told:
            self._has_told = True
            with contextlib.suppress(RuntimeError):  # another process was asked as well, and was first
                set_key(STOP, f"{step + 2} {int(self._request.signal)}")
        agreed = try_get_key(STOP)
        if agreed is None:
            return False
        last, number = map(int, agreed.split())
        if self._request.signal is None:
            self._request.at = time.monotonic()
        self._request.signal = signal.Signals(number)
        return step >= last
