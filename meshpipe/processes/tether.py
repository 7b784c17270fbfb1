"""A process that `launch` started ends with it, however the launcher ends."""

import os
import signal
import threading

VARIABLE = "MESHPIPE_LAUNCHER"
"""Holds the number of a file descriptor: the end for reading of a pipe that the launcher alone can write to."""


class Tether:
    """The launcher's side: a pipe whose end for writing closes when the launcher is gone, even by SIGKILL."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()

    @property
    def environment(self) -> dict[str, str]:
        """For a process that inherits `reader`."""
        return {VARIABLE: str(self.reader)}

    def close(self) -> None:
        os.close(self.reader)
        os.close(self._writer)


def end_with_launcher() -> None:
    """Has this process stop as by SIGTERM, with a last save, once the launcher that started it is gone.

    Does nothing in a process that no launcher started.
    """
    number = os.environ.pop(VARIABLE, None)
    if number is None:
        return
    reader = int(number)
    os.set_inheritable(reader, False)
    threading.Thread(target=_wait, args=(reader,), name="tether", daemon=True).start()


def _wait(reader: int) -> None:
    os.read(reader, 1)  # nothing is ever written
    os.kill(os.getpid(), signal.SIGTERM)
