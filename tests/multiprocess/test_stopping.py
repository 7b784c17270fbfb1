"""Runs that are asked to stop, even during a stuck step, and runs that one process refuses."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from processes import ROOT, TIMEOUT, environment, run_processes
from test_faults import process_id
from waiting import wait_until

from meshpipe.checkpoint import list_checkpoints
from meshpipe.processes.launch import free_port

HERE = Path(__file__).parent
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
UNEVEN = HERE / "uneven_recipes.py"
NO_BATCH = ("--data.gate", "never", "--data.open-for", "8")


def start(folder: Path, number: int, command: Sequence[str]) -> "subprocess.Popen[str]":
    with open(folder / f"{number}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment(), stdout=log, stderr=subprocess.STDOUT, text=True
        )


def start_two(folder: Path, command: Sequence[str]) -> "list[subprocess.Popen[str]]":
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--process-count", "2", "--process-id"]
    return [start(folder, number, [*command, *place, str(number)]) for number in range(2)]


def logs(folder: Path) -> str:
    return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in sorted(folder.glob("*.log")))


def wait_for(folder: Path, text: str, of: int = 0) -> None:
    wait_until(lambda: text in (folder / f"{of}.log").read_text(), lambda: logs(folder))


def codes(folder: Path, processes: "list[subprocess.Popen[str]]") -> list[int]:
    deadline = time.monotonic() + TIMEOUT
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise AssertionError(logs(folder)) from None
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_a_hangup_saves_and_gives_129(tmp_path: Path) -> None:
    flags = ["--steps", "1000000", "--eval-batches", "0", "--checkpoint-dir", "run"]
    process = start(tmp_path, 0, ["-m", "meshpipe", "train", TINY, *flags])
    wait_for(tmp_path, "  loss ")
    process.send_signal(signal.SIGHUP)
    assert codes(tmp_path, [process]) == [129]
    assert len(list_checkpoints(tmp_path / "run")) == 1
    assert "SIGHUP: stopping after the step in progress" in logs(tmp_path)


def test_a_stop_does_not_wait_for_ever_for_a_hanging_process(tmp_path: Path) -> None:
    processes = start_two(tmp_path, [str(HERE / "impatient.py"), "train", f"{UNEVEN}:hangs"])
    wait_for(tmp_path, "step 1 is dispatched")
    processes[0].send_signal(signal.SIGTERM)
    assert codes(tmp_path, processes) == [1, 1], logs(tmp_path)
    assert "SIGTERM asked to stop, and step " in logs(tmp_path)
    assert "; waiting for process 1, at step " in logs(tmp_path)
    assert "Traceback" not in logs(tmp_path)


def test_a_request_that_one_process_refuses_ends_all_with_code_2(tmp_path: Path) -> None:
    ended = run_processes(2, ["-m", "meshpipe", "train", f"{UNEVEN}:refuses"], tmp_path)
    assert ended.codes == [2, 2], ended
    for log in ended.logs:
        assert "no such file on this machine: held_out.txt" in log, ended
        assert "Traceback" not in log, ended


@pytest.mark.slow
def test_a_kill_before_all_have_joined_ends_a_launch_within_seconds(tmp_path: Path) -> None:
    run = start(tmp_path, 0, ["-m", "meshpipe", "launch", "--processes", "2", "--", "train", TINY])
    found: list[int] = []

    def is_there() -> list[int]:
        with contextlib.suppress(AssertionError):  # not started yet
            found.append(process_id(run.pid, 1))
        return found

    wait_until(is_there)
    os.kill(found[0], signal.SIGKILL)  # while it imports
    assert codes(tmp_path, [run]) == [137], logs(tmp_path)
    assert "by SIGKILL" not in logs(tmp_path)
    assert "Ending process 0, not yet joined." in logs(tmp_path)


@pytest.mark.slow
def test_before_the_first_step_a_stop_is_immediate_for_all(tmp_path: Path) -> None:
    processes = start_two(
        tmp_path, ["-m", "meshpipe", "train", TINY, "--model.depth", "64", "--run-dir", "run", *NO_BATCH]
    )
    wait_for(tmp_path, "No accelerator")
    lock = tmp_path / "run" / "checkpoints" / "writer.lock"  # of process 0
    wait_until(lock.exists, lambda: logs(tmp_path))
    processes[1].send_signal(signal.SIGTERM)
    assert codes(tmp_path, processes) == [143, 143], logs(tmp_path)
    assert "SIGTERM: stopped before the first step; nothing was saved." in (tmp_path / "1.log").read_text()
    assert "process 0 stops because process 1 was asked to stop by SIGTERM." in (tmp_path / "0.log").read_text()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_reports_it_on_waking(stopped: int, tmp_path: Path) -> None:
    other = 1 - stopped
    processes = start_two(tmp_path, ["-m", "meshpipe", "train", TINY, "--steps", "1000000", "--eval-batches", "0"])
    wait_for(tmp_path, "  loss ")
    processes[stopped].send_signal(signal.SIGSTOP)
    assert processes[other].wait(TIMEOUT) != 0
    processes[stopped].send_signal(signal.SIGCONT)
    assert processes[stopped].wait(TIMEOUT) != 0
    wait_for(tmp_path, f"process {stopped} stops because it did not run for ", of=stopped)  # by its exit reporter
    log = (tmp_path / f"{stopped}.log").read_text()
    assert f"process {stopped} stops because process {other}" not in log, logs(tmp_path)
    assert "Traceback" not in log, logs(tmp_path)
