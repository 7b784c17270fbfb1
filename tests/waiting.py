"""Waiting for what has to have happened, however busy the machine is."""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

LONG = 300.0
"""Seconds after which something will never happen; only a test that fails waits for so long."""


def wait_until(has_happened: Callable[[], object], report: Callable[[], object] = str) -> None:
    """Fails with the report where it never happens."""
    deadline = time.monotonic() + LONG
    while not has_happened():
        assert time.monotonic() < deadline, report()
        time.sleep(0.005)


def wait_for(*files: Path) -> None:
    wait_until(lambda: all(file.exists() for file in files), lambda: files)


def has_signal(process: int, number: int, field: str) -> bool:
    """Whether Linux has a signal of a process in a field of /proc/PID/status, e.g. SigCgt: those that it handles."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (signals,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return bool(int(signals, 16) >> (number - 1) & 1)


def processor_seconds(process: int) -> float:
    """The processor time that a running process has taken; unlike time, it hardly grows where others are at work."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def processor_seconds_of_ended() -> float:
    """That of all children that have ended so far and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
