"""Shows the phases of a command that take longer than a moment."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from meshpipe.phases import Phase, listening
from meshpipe.report.live_line import LiveLine

QUIET_SECONDS = 2.0
"""Shorter phases leave no line behind."""
SECONDS_BETWEEN_LINES = 10.0
"""Between the lines of one phase where they are not live."""
TICK_SECONDS = 0.1
LIVE_SECONDS = 0.3
"""On a terminal, a phase is shown after this long, so that short ones do not flicker."""


@contextmanager
def showing_phases(line: LiveLine, *, on_stderr: bool) -> Iterator[None]:
    """While entered, shows each phase that takes long: on the live line, or by plain lines where there can be none."""
    display = _Display(line, on_stderr)
    threading.Thread(target=display.run, name="phases", daemon=True).start()
    try:
        with listening(display.hear):
            yield
    finally:
        display.close()


class _Display:
    def __init__(self, line: LiveLine, on_stderr: bool) -> None:
        self._line, self._on_stderr = line, on_stderr
        self._active: dict[int, Phase] = {}
        """By key, in the order in which they began."""
        self._said: dict[int, float] = {}
        """When the last plain line about a phase was printed."""
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._is_done = False

    def hear(self, phase: Phase) -> None:
        with self._lock:
            if phase.seconds is None:
                self._active[phase.key] = phase
                self._wake.set()
                return
            self._active.pop(phase.key, None)
            said = self._said.pop(phase.key, None)
            if not self._active:
                self._wake.clear()
                self._line.erase()
            if said is not None or phase.seconds >= QUIET_SECONDS:
                self._print(f"{phase}.")

    def run(self) -> None:
        while not self._is_done:
            self._wake.wait()
            with self._lock:
                if self._active:
                    self._show(next(reversed(self._active.values())))
            time.sleep(TICK_SECONDS)

    def close(self) -> None:
        with self._lock:
            self._is_done = True
            self._active.clear()
            self._wake.set()
            self._line.erase()

    def _show(self, phase: Phase) -> None:
        """Shows the phase that began last, which is a part of the others or runs beside them."""
        now = time.monotonic()
        seconds = now - phase.began
        if seconds >= LIVE_SECONDS and self._line.show(f"{phase}, {seconds:.0f} s"):
            return
        last = self._said.get(phase.key)
        if seconds >= QUIET_SECONDS and (last is None or now - last >= SECONDS_BETWEEN_LINES):
            self._said[phase.key] = now
            self._print(f"{phase} ..." if last is None else f"{phase}, {seconds:.0f} s")

    def _print(self, text: str) -> None:
        stream = sys.stderr if self._on_stderr else sys.stdout
        if stream is not None:
            print(text, file=stream, flush=True)
