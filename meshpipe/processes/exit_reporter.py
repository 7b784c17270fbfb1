"""Reports why a process ended when it could not report it itself: it was killed, or JAX aborted it.

The client of `jax.distributed` aborts its process from a C++ thread within a quarter of a second after process 0 is
gone. No public option prevents this, and no Python runs any more. So in a run of several processes, each starts a small
child, which reads from a pipe that closes when its parent ends. This file is also the child's program: it does not
import JAX, and takes 10 MB.
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
"""The file in every complete checkpoint that lists the sizes of all others."""
LARGEST_LIST = 64 << 20
"""Largest accepted size of that file, in bytes."""
CANCEL = b"."
HEARTBEAT = b" "
STOPPED_SECONDS = 5.0
"""A process without a heartbeat for this long was stopped."""
PATIENCE_SECONDS = 5.0
"""How long the coordinator may take to accept a connection before it counts as gone."""


class ExitReporter:
    """While entered, a child process waits, and prints to standard error how this process ended unless cancelled.

    `process` is the number of this process, `coordinator` the HOST:PORT of process 0, `folder` the checkpoint folder.
    """

    def __init__(self, process: int, coordinator: str, folder: str | None) -> None:
        self._arguments = [str(process), coordinator, folder or ""]

    def __enter__(self) -> "ExitReporter":
        command = [sys.executable, "-I", "-S", __file__, *self._arguments]
        # In its own session, the child does not receive signals from the terminal.
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def heartbeat(self) -> None:
        """Call this regularly; it shows the child that this process is running."""
        with contextlib.suppress(OSError, ValueError):  # the child has ended, or was cancelled
            os.write(self._child.stdin.fileno(), HEARTBEAT)  # type: ignore[union-attr]

    def cancel(self) -> None:
        """Call this when the process has reported its exit itself, or succeeds."""
        assert self._child.stdin is not None
        if self._child.stdin.closed:
            return
        try:
            self._child.stdin.write(CANCEL)
            self._child.stdin.close()
            self._child.wait(PATIENCE_SECONDS)
        except (OSError, subprocess.TimeoutExpired):  # the child was killed or stopped
            pass


def saved_sentence(folder: str | None) -> str:
    """Names the newest checkpoint whose files all have their listed sizes, which is quick to check. Their contents are
    checked when the run is resumed.
    """
    names = os.listdir(folder) if folder and os.path.isdir(folder) else []
    steps = sorted((int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,15}", name)), reverse=True)
    for step in steps:
        if _has_all_files(os.path.join(folder or "", str(step))):
            return f"The newest checkpoint is step {step} of {folder}."
    return "Nothing was saved."


def _has_all_files(step: str) -> bool:
    """Whether a step has its list of files, and every file has its listed size. The contents are untrusted input."""
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
    """Explains why a process missed what the others did."""
    return f"it did not run for {seconds:.0f} s itself (stopped, e.g. by SIGSTOP, or without a processor)."


def main(process: int, coordinator: str, folder: str | None) -> None:
    """Waits for the parent to end, and reports how it ended unless cancelled."""
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
    # A single write, so lines of processes that share a file do not interleave.
    os.write(2, f"meshpipe: {why}.\n{saved_sentence(folder)}\n".encode())


def _listens(address: str) -> bool:
    """Whether the address accepts connections; a slow answer counts as none."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PATIENCE_SECONDS):
            return True
    except OSError:
        return False


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3] or None)
