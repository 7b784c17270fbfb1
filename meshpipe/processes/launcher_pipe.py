"""Pipes between `launch` and its processes: they end when the launcher ends, and report when they are guarded."""

import contextlib
import os
import signal
import threading

VARIABLE = "MESHPIPE_LAUNCHER"
"""Environment variable with a file descriptor: the read end of a pipe whose write end only the launcher holds."""
GUARDED = "MESHPIPE_GUARDED"
"""Environment variable with a file descriptor to which guarded processes write their numbers."""


class LauncherPipe:
    """The launcher's side: a pipe that closes when the launcher ends, even by SIGKILL, and one on which processes
    report that they have joined the others and watch them.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        self._guarded_reader, self.guarded_writer = os.pipe()
        os.set_blocking(self._guarded_reader, False)
        self._guarded: set[int] = set()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that inherits `reader` and `guarded_writer`."""
        return {VARIABLE: str(self.reader), GUARDED: str(self.guarded_writer)}

    def guarded(self) -> set[int]:
        """The processes that end by themselves when another one ends."""
        with contextlib.suppress(BlockingIOError):
            while received := os.read(self._guarded_reader, 4096):
                self._guarded.update(map(int, received.split()))
        return self._guarded

    def close(self) -> None:
        for number in (self.reader, self._writer, self._guarded_reader, self.guarded_writer):
            os.close(number)


def report_guarded(process: int) -> None:
    """Reports to the launcher, if there is one, that this process notices by itself when another is gone."""
    number = os.environ.pop(GUARDED, None)
    if number is not None:
        with contextlib.suppress(OSError):  # the launcher is gone
            os.write(int(number), f"{process}\n".encode())
            os.close(int(number))


def end_with_launcher() -> None:
    """Sends this process SIGTERM, after which it saves and ends, when its launcher is gone.

    Does nothing without a launcher.
    """
    number = os.environ.pop(VARIABLE, None)
    if number is None:
        return
    reader = int(number)
    os.set_inheritable(reader, False)
    threading.Thread(target=_wait, args=(reader,), name="launcher pipe", daemon=True).start()


def _wait(reader: int) -> None:
    os.read(reader, 1)  # nothing is ever written
    os.kill(os.getpid(), signal.SIGTERM)
