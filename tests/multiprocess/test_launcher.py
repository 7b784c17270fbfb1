"""A run saves and ends with its launcher, however the launcher ends."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from processes import ROOT, TIMEOUT, environment
from waiting import wait_until

from meshpipe.checkpoint import list_checkpoints, verify_checkpoint

RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"


def processes_of(folder: Path) -> list[int]:
    """The processes that run in a folder, except for exit reporters."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder and "--process-id" in (entry / "cmdline").read_text().split("\0"):
                found.append(int(entry.name))
        except OSError:  # it has just ended, or is somebody else's
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGQUIT, 131, marks=pytest.mark.slow),
    ],
)
def test_a_run_saves_and_ends_with_its_launcher(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """Its output has no reader any more, as after the launcher's terminal was closed."""
    command = [sys.executable, "-m", "meshpipe", "launch", "--processes", "2", "--", "train", RECIPE, "--eval-batches"]
    command += ["0", "--steps", "1000000", "--checkpoint-dir", "run"]
    reader, writer = os.pipe()
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=writer, stderr=writer)
    os.close(writer)
    timer = threading.Timer(TIMEOUT, launcher.kill)
    timer.start()
    lines = []
    with open(reader, errors="replace") as output:
        for line in output:
            lines.append(line)
            if "step 100/" in line:
                break
    assert len(processes_of(tmp_path)) == 2, "".join(lines)
    launcher.send_signal(number)
    assert launcher.wait(TIMEOUT) == code
    timer.cancel()
    wait_until(lambda: not processes_of(tmp_path), lambda: processes_of(tmp_path))
    (step,) = list_checkpoints(tmp_path / "run")
    assert step >= 100
    assert not verify_checkpoint(tmp_path / "run", step)
