"""Says why a process has ended when it could not say so itself: it was killed, or JAX aborted it.

The client of `jax.distributed` aborts its process, from a thread of C++, within a quarter of a second after process 0
is gone; no public option prevents it, and no Python runs any more. So each of several processes starts a small child,
which reads from a pipe that ends with its parent. This file is the child's program too: it imports no JAX, and takes 10
MB.
"""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import zlib
from types import TracebackType

CHECKSUMS = "checksums.json"
"""The file that every whole checkpoint has: the sizes of all others."""
LARGEST_LIST = 64 << 20
"""Bytes that the file may have."""
CANCEL = b"."
HEARTBEAT = b" "
STOPPED_SECONDS = 5.0
"""A process that did not run for so long was stopped."""
PATIENCE_SECONDS = 5.0
"""How long a coordinator may take to answer before it counts as gone."""


class ExitReporter:
    """While entered, a child waits, and says on standard error how this process ended unless it was told not to.

    `process` is the number of this process, `coordinator` the HOST:PORT of process 0, `folder` that of the checkpoints.
    """

    def __init__(self, process: int, coordinator: str, folder: str | None) -> None:
        self._arguments = [str(process), coordinator, folder or ""]

    def __enter__(self) -> "ExitReporter":
        command = [sys.executable, "-I", "-S", __file__, *self._arguments]
        # What a terminal sends to all processes in front is not for the child.
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def heartbeat(self) -> None:
        """To be called every now and then, so that the child knows whether this process runs."""
        with contextlib.suppress(OSError, ValueError):  # the child has ended, or was cancelled
            os.write(self._child.stdin.fileno(), HEARTBEAT)  # type: ignore[union-attr]

    def cancel(self) -> None:
        """To be called when this process has said itself why it ends, or ends well."""
        assert self._child.stdin is not None
        if self._child.stdin.closed:
            return
        try:
            self._child.stdin.write(CANCEL)
            self._child.stdin.close()
            self._child.wait(PATIENCE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):  # somebody has ended the child, or stopped it
            pass


def saved_sentence(folder: str | None) -> str:
    """Which checkpoint a run can be resumed from, as far as can be told in an instant: the newest whose files all have
    their sizes. Whether every byte is right is found when it is resumed.
    """
    names = os.listdir(folder) if folder and os.path.isdir(folder) else []
    steps = sorted((int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,15}", name)), reverse=True)
    for step in steps:
        if _has_all_files(os.path.join(folder or "", str(step))):
            return f"The newest checkpoint is step {step} of {folder}."
    return "Nothing was saved."


def _has_all_files(step: str) -> bool:
    """Whether a step has its list, and all files on it in their sizes. Nothing that is read is trusted."""
    try:
        descriptor = os.open(os.path.join(step, CHECKSUMS), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_LIST:
                return False
            saved = json.loads(file.read(LARGEST_LIST))
        files = saved["files"]
        if zlib.crc32(json.dumps(files, sort_keys=True).encode()) != saved["crc32"]:
            return False
        return bool(files) and all(
            os.stat(os.path.join(step, name), follow_symlinks=False).st_size == size
            for name, (size, _) in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def stopped_sentence(seconds: float) -> str:
    """Why a process did not notice what the others did."""
    return f"it did not run for {seconds:.0f} s itself (stopped, e.g. by SIGSTOP, or without a processor)."


def main(process: int, coordinator: str, folder: str | None) -> None:
    """Waits for the parent to end, and says how, if it has not."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    last, stopped = time.monotonic(), 0.0
    while (received := os.read(sys.stdin.fileno(), 4096)) and CANCEL not in received:
        now = time.monotonic()
        stopped, last = (now - last if now - last > STOPPED_SECONDS else stopped), now
    if received:
        return
    stopped = max(stopped, time.monotonic() - last)
    gone = process > 0 and not _listens(coordinator)
    if gone and stopped > STOPPED_SECONDS:
        why = f"process {process} stops because {stopped_sentence(stopped)} The others have ended without it"
    elif gone:
        why = f"process {process} stops because process 0, which coordinates the run, is gone"
    else:
        why = f"process {process} is gone: it was killed, or it crashed"
    # One write, so that processes that share a file do not mix their lines.
    os.write(2, f"meshpipe: {why}.\n{saved_sentence(folder)}\n".encode())


def _listens(address: str) -> bool:
    """Whether somebody accepts connections there; one who only takes long to answer counts as gone too."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE_SECONDS):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3] or None)
