"""When one process of a run is stopped, killed or hangs, all of them end and report why."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import ROOT, TIMEOUT, environment, run_processes

from meshpipe.checkpoint import list_checkpoints, verify_checkpoint

RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
FOR_EVER = ("--steps", "1000000")


def launch(folder: Path, act: Callable[[int], object], to: int, *flags: str, restarts: int = 0) -> tuple[int, str]:
    """Starts a run of two processes and does something to one of them, given its id; the exit code of the launcher and
    its output.
    """
    command = [sys.executable, "-m", "meshpipe", "launch", "--processes", "2", "--max-restarts", str(restarts), "--"]
    command += ["train", RECIPE, "--eval-batches", "0", *flags]
    run = subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    timer = threading.Timer(TIMEOUT, run.kill)
    timer.start()
    lines: list[str] = []
    process = 0
    assert run.stdout is not None
    for line in run.stdout:
        lines.append(line)
        if "step 100/" in line and not process:
            process = process_id(run.pid, to)
            act(process)
        if "waiting for the others to end" in line and not restarts and is_stopped(process):
            os.kill(process, signal.SIGKILL)  # or else the launcher would do so, a while later
    code = run.wait()
    timer.cancel()
    assert process, "".join(lines)
    return code, "".join(lines)


def send(number: signal.Signals) -> Callable[[int], object]:
    return lambda process: os.kill(process, number)


def fill_disk(process: int) -> None:
    """Makes the disk look full to this process once a file grows larger than its logs."""
    resource.prlimit(process, resource.RLIMIT_FSIZE, (20_000, 20_000))


def is_stopped(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


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
def test_a_signal_to_one_process_stops_all(tmp_path: Path) -> None:
    code, output = launch(tmp_path, send(signal.SIGTERM), 1, *FOR_EVER)
    assert code == 143, output
    assert "[0] Stopped after step " in output


SAVED = ("--checkpoint-dir", "run", "--checkpoint-every", "10")
SERVED = ("--transfers", "server")
GOOD = "The newest checkpoint is step "


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "to", "flags", "code", "messages"),
    [
        pytest.param(
            *(signal.SIGKILL, 1, SAVED, 137, ["process 0 stops because process 1 sends no heartbeat", GOOD]),
            id="another is killed",
        ),
        pytest.param(
            *(signal.SIGKILL, 0, SAVED, 137, ["process 1 stops because process 0, which coordinates the run", GOOD]),
            id="the coordinator is killed",
        ),
        pytest.param(
            *(signal.SIGKILL, 1, (*SAVED, *SERVED), 137),
            ["process 0 stops because process 1 sends no heartbeat", GOOD],
            id="another is killed, which offers arrays",
        ),
        pytest.param(
            *(signal.SIGKILL, 0, (*SAVED, *SERVED), 137),
            ["process 1 stops because process 0, which coordinates the run", GOOD],
            id="the coordinator is killed, which offers arrays",
        ),
        pytest.param(
            *(signal.SIGSTOP, 1, (), 1, ["process 0 stops because process 1 sends no heartbeat"]),
            id="another hangs",
        ),
        pytest.param(
            *(signal.SIGSTOP, 1, SERVED, 1, ["process 0 stops because process 1 sends no heartbeat"]),
            id="another hangs, which offers arrays",
        ),
        pytest.param(
            *(signal.SIGSTOP, 1, ("--step-timeout", "3"), 1, ["no step has ended for 3 s: rank 0 waits in "]),
            id="another hangs, and steps are watched",
        ),
        pytest.param(
            *(signal.SIGSTOP, 0, ("--step-timeout", "3"), 1),
            ["no step has ended for 3 s: rank 1 ", "because process 0, which coordinates the run, does not answer"],
            id="the coordinator hangs, and steps are watched",
        ),
    ],
)
def test_all_end_when_one_is_gone(
    sent: signal.Signals, to: int, flags: tuple[str, ...], code: int, messages: list[str], tmp_path: Path
) -> None:
    found, output = launch(tmp_path, send(sent), to, *FOR_EVER, *flags)
    assert found == code, output
    assert all(message in output for message in messages), output
    assert "by SIGKILL" not in output, output  # as the launcher says after 20 s


@needs_proc
@pytest.mark.slow
def test_a_restarted_run_reproduces_the_losses(tmp_path: Path) -> None:
    flags = ("--steps", "300", "--metrics", "metrics.jsonl")
    code, output = launch(tmp_path, send(signal.SIGKILL), 0, *flags, *SAVED, restarts=1)
    assert code == 0, output
    assert "Restarting the run (1 of 1)." in output
    assert "[0] Completed after step 300 of 300" in output
    (tmp_path / "alone").mkdir()
    ended = run_processes(1, ["-m", "meshpipe", "train", RECIPE, "--eval-batches", "0", *flags], tmp_path / "alone")
    assert ended.codes == [0], ended
    losses = read_losses(tmp_path / "metrics.jsonl")
    expected = read_losses(tmp_path / "alone" / "metrics.jsonl")
    assert len(losses) > len(expected) == 300, "the steps after the last checkpoint were done twice"
    assert set(losses) == set(expected)


def read_losses(metrics: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


@needs_proc
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits the files of another process")
def test_a_full_disk_of_one_process_ends_all_and_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    wide = ("--model.width", "128", "--data.width", "128")
    code, output = launch(tmp_path, fill_disk, 1, *FOR_EVER, *SAVED, *wide)
    assert code == 1, output
    steps = list_checkpoints(tmp_path / "run")
    assert len(steps) == 3
    assert not any(verify_checkpoint(tmp_path / "run", step) for step in steps)
    for process in (0, 1):
        assert f"[{process}] The newest checkpoint is step {steps[-1]} of run." in output
    assert "could not be written" in output
    assert "process 1: [Errno 27] File too large" in output
    assert "by SIGKILL" not in output, output
