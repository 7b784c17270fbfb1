"""When one process of a run is stopped, killed or hangs, all of them end, and say why."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import ROOT, TIMEOUT, environment

RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"


def launch(folder: Path, sent: signal.Signals, to: int) -> tuple[int, str, float]:
    """Starts a run of two processes, sends one of them a signal; its exit code, output, and seconds to the end."""
    flags = ["--steps", "1000000", "--eval-batches", "0", "--checkpoint-every", "0"]
    command = [sys.executable, "-m", "meshpipe", "launch", "--processes", "2", "--", "train", RECIPE, *flags]
    run = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(TIMEOUT, run.kill)
    timer.start()
    lines: list[str] = []
    sent_at = 0.0
    assert run.stdout is not None
    for line in run.stdout:
        lines.append(line)
        if "step 100/" in line and not sent_at:
            os.kill(process_id(run.pid, to), sent)
            sent_at = time.monotonic()
    code = run.wait()
    timer.cancel()
    assert sent_at, "".join(lines)
    return code, "".join(lines), time.monotonic() - sent_at


def process_id(launcher: int, number: int) -> int:
    """The id of a process that the launcher has started."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_text().split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        place = arguments.index("--process-id") + 1 if "--process-id" in arguments else 0
        if parent == launcher and place and arguments[place] == str(number):
            return int(entry.name)
    raise AssertionError(f"process {number} is not there")


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")


@needs_proc
def test_a_process_that_is_asked_to_stop_stops_all(tmp_path: Path) -> None:
    code, output, _ = launch(tmp_path, signal.SIGTERM, to=1)
    assert code == 143, output
    assert "[0] Stopped after step " in output


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "to", "code", "message"),
    [
        (signal.SIGKILL, 1, 137, "process 0 stops because process 1 gives no sign of life"),
        (signal.SIGKILL, 0, 137, "Process 0 ended with exit code 137"),
        (signal.SIGSTOP, 1, 1, "process 0 stops because process 1 gives no sign of life"),
        (signal.SIGSTOP, 0, 1, "process 1 stops because process 0, which coordinates the run, does not answer"),
    ],
)
def test_all_end_when_one_is_gone(sent: signal.Signals, to: int, code: int, message: str, tmp_path: Path) -> None:
    found, output, seconds = launch(tmp_path, sent, to)
    assert found == code, output
    assert message in output
    assert seconds < 60, output  # what hangs is killed by the launcher 20 s after the others have ended
