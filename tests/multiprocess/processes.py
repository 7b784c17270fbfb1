"""Runs the processes of one run on loopback, with time-outs; on a failure, shows all logs."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meshpipe.processes.launch import free_port

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240
"""Time-out of a run in seconds; CI machines can be slow."""


@dataclass(frozen=True)
class Ended:
    """The exits of the processes of a run, in order of their numbers."""

    codes: list[int]
    logs: list[str]

    def __str__(self) -> str:
        parts = [
            f"--- process {i}: exit code {c}\n{log}"
            for i, (c, log) in enumerate(zip(self.codes, self.logs, strict=True))
        ]
        return "\n".join(parts)


def environment(**more: str) -> dict[str, str]:
    """The environment of a user, without the settings of the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("NPROC", "JAX_PLATFORMS")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    return kept | {"PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"} | more


def run_processes(
    count: int,
    command: Sequence[str],
    folder: Path,
    own: Sequence[Sequence[str]] = (),
    last: Sequence[Sequence[str]] = (),
    **more: str,
) -> Ended:
    """Runs `python COMMAND`, in `count` processes with their `--coordinator` and so on, until all have ended.

    `own` has further arguments for each process, and `last` those that come after all others.
    """
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--process-count", str(count), "--process-id"]
    logs = [folder / f"process-{number}-of-{count}.log" for number in range(count)]
    processes = []
    for number, log in enumerate(logs):
        with open(log, "w") as output:
            arguments = [sys.executable, *command, *(own[number] if own else ())]
            arguments += [*place, str(number)] if count > 1 else []
            arguments += last[number] if last else ()
            processes.append(
                subprocess.Popen(
                    arguments, cwd=folder, env=environment(**more), stdout=output, stderr=subprocess.STDOUT
                )
            )
    deadline = time.monotonic() + TIMEOUT
    try:
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return Ended([process.wait() for process in processes], [log.read_text() for log in logs])
