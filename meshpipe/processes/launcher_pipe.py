"""A process that `launch` started ends with it, however the launcher ends, and says when it needs no help to end."""

import contextlib
import os
import signal
import threading

VARIABLE = "MESHPIPE_LAUNCHER"
"""Holds the number of a file descriptor: the end for reading of a pipe that the launcher alone can write to."""


GUARDED = "MESHPIPE_GUARDED"
"""Holds the number of a file descriptor to which the processes write their numbers."""


class LauncherPipe:
    """The launcher's side: a pipe whose end for writing closes when the launcher is gone, even by SIGKILL, and one by
    which it hears of processes that have joined the others and watch them.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        self._guarded_reader, self.guarded_writer = os.pipe()
        os.set_blocking(self._guarded_reader, False)
        self._guarded: set[int] = set()

    @property
    def environment(self) -> dict[str, str]:
        """For a process that inherits `reader` and `guarded_writer`."""
        return {VARIABLE: str(self.reader), GUARDED: str(self.guarded_writer)}

    def guarded(self) -> set[int]:
        """The processes that end by themselves when one of the others has."""
        with contextlib.suppress(BlockingIOError):
            while received := os.read(self._guarded_reader, 4096):
                self._guarded.update(map(int, received.split()))
        return self._guarded

    def close(self) -> None:
        for number in (self.reader, self._writer, self._guarded_reader, self.guarded_writer):
            os.close(number)


def report_guarded(process: int) -> None:
    """Tells the launcher, where there is one, that this process will notice by itself when another is gone."""
    number = os.environ.pop(GUARDED, None)
    if number is not None:
        with contextlib.suppress(OSError):  # the launcher is gone
            os.write(int(number), f"{process}\n".encode())
            os.close(int(number))


def end_with_launcher() -> None:
    """Has this process stop as by SIGTERM, with a last save, once the launcher that started it is gone.

    Does nothing in a process that no launcher started.
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
