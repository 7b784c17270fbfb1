"""Starts JAX's devices in a child process, since a driver that is broken may hang or crash it.

This file is also the child's program.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LINES = 4
"""Lines of standard error to keep."""
PATIENCE_SECONDS = 3.0
"""How long a killed child may take to end. One that waits inside a driver never does, and is left behind."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What JAX said of its devices."""

    devices: tuple[Mapping[str, Any], ...] = ()
    """Of each device: its `platform`, `kind`, and `memory` in bytes, or None."""
    seconds: float = 0.0
    """Time that starting took."""
    error: str | None = None
    """Why there are no devices; None if there are."""
    said: tuple[str, ...] = ()
    """The last lines that JAX wrote to standard error, such as why a plugin did not start."""

    @property
    def platforms(self) -> set[str]:
        return {device["platform"] for device in self.devices}


def probe_devices(timeout: float, environment: Mapping[str, str] = os.environ) -> Probe:
    """The devices that JAX sees in a new process with this environment; waits for it for `timeout` seconds."""
    start = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-P", __file__],
        env={**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, error = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        return Probe(seconds=timeout, error=f"JAX did not start its devices within {timeout:g} s.")
    finally:
        _end(child)
    seconds = time.monotonic() - start
    lines, said = out.splitlines(), tuple(line.strip() for line in error.splitlines() if line.strip(" ^~"))[-LINES:]
    if child.returncode == 0 and lines:
        return Probe(devices=tuple(json.loads(lines[-1])), seconds=seconds, said=said)
    return Probe(seconds=seconds, error=f"JAX did not start its devices (exit code {child.returncode}).", said=said)


def _end(child: "subprocess.Popen[str]") -> None:
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.communicate(timeout=PATIENCE_SECONDS)


def _main() -> None:
    import jax

    found = []
    for device in jax.devices():
        try:
            memory = (device.memory_stats() or {}).get("bytes_limit")
        except Exception:  # a backend without statistics may raise anything
            memory = None
        found.append({"platform": device.platform, "kind": device.device_kind, "memory": memory})
    print(json.dumps(found))


if __name__ == "__main__":
    _main()
