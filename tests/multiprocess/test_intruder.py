"""An intruder without the run's secret is refused and reported, and cannot affect results."""

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from intruder import knock, listening_ports
from processes import ROOT, TIMEOUT, environment, run_processes

from meshpipe.processes.launch import free_port

RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
TRAIN = ["-m", "meshpipe", "train", RECIPE, "--eval-batches", "0"]
needs_proc = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds ports in /proc")


@contextmanager
def intruder(deed: str) -> Iterator[Callable[[str], None]]:
    """Yields a function that starts an intruder against a coordinator immediately."""
    command = [sys.executable, str(Path(__file__).parent / "intruder.py"), deed]
    process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"

    def let_loose(coordinator: str) -> None:
        process.stdin.write(f"{coordinator}\n")
        process.stdin.flush()

    try:
        yield let_loose
    finally:
        process.kill()
        process.communicate()


def run_with(
    folder: Path, flags: list[str], sign: str, act: Callable[[str, list[int]], object], codes: list[int]
) -> list[str]:
    """The logs of a run of two processes with a secret, with which something is done once process 0 has printed a sign:
    `act` gets the coordinator's address and the ids of the processes.
    """
    coordinator = f"127.0.0.1:{free_port()}"
    own = environment(MESHPIPE_SECRET=secrets.token_hex(32))
    logs = [folder / f"process-{number}.log" for number in range(2)]
    run = []
    for number, log in enumerate(logs):
        place = ["--coordinator", coordinator, "--process-count", "2", "--process-id", str(number)]
        with open(log, "w") as output:
            command = [sys.executable, *TRAIN, *flags, *place]
            run.append(subprocess.Popen(command, cwd=folder, env=own, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + TIMEOUT
    try:
        while sign not in logs[0].read_text() and all(process.poll() is None for process in run):
            assert time.monotonic() < deadline, [log.read_text() for log in logs]
            time.sleep(0.01)
        act(coordinator, [process.pid for process in run])
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in run:
                process.wait(max(0.1, deadline - time.monotonic()))
    finally:
        for process in run:
            process.kill()
    found = [log.read_text() for log in logs]
    assert [process.wait() for process in run] == codes, "\n---\n".join(found)
    return found


def says(number: int, why: str, log: str) -> bool:
    """Whether a process stops for this reason. It found it itself, or was told by the other."""
    return (
        re.search(rf"process {number} stops because (process {1 - number} on \S+ failed: )?{re.escape(why)}", log)
        is not None
    )


@pytest.mark.parametrize(
    "sign",
    [
        pytest.param("No accelerator", id="before the first transfer"),
        pytest.param("step 100/", id="in a step", marks=pytest.mark.slow),
    ],
)
def test_overwriting_messages_of_the_run_is_reported(sign: str, tmp_path: Path) -> None:
    with intruder("overwrite") as let_loose:
        logs = run_with(tmp_path, ["--steps", "1000000"], sign, lambda address, ids: let_loose(address), [1, 1])
    for number, log in enumerate(logs):
        assert says(number, "someone without the run's secret wrote meshpipe/", log), log
        assert "Traceback" not in log, log


def test_who_deletes_what_processes_tell_each_other_is_named(tmp_path: Path) -> None:
    with intruder("delete") as let_loose:
        logs = run_with(
            tmp_path, ["--steps", "1000000"], "No accelerator", lambda address, ids: let_loose(address), [1, 1]
        )
    for number, log in enumerate(logs):
        assert says(number, "someone outside the run deleted meshpipe/", log), log
        assert "Traceback" not in log, log


def test_nobody_waits_for_a_key_that_was_deleted(tmp_path: Path) -> None:
    """In a program that runs no `Guard`."""
    ended = run_processes(2, [str(Path(__file__).parent / "deleted_key.py")], tmp_path)
    assert ended.codes == [1, 1], ended
    for number, log in enumerate(ended.logs):
        said = f"process {number} stops because someone outside the run deleted meshpipe/group/all/0/last stage/0 "
        assert said in log, ended
        assert "heard" not in log, ended


@pytest.mark.slow
@needs_proc
def test_idle_connections_and_foreign_keys_change_nothing(tmp_path: Path) -> None:
    """Idle connections, garbage, and the four zero bytes at which JAX's own server would abort."""
    visits = []

    def visit(coordinator: str, processes: list[int]) -> None:
        let_loose(coordinator)
        for process in processes:
            ports = listening_ports(process)
            # One for arrays, one of Gloo, which JAX opens on CPU, and the coordinator's.
            assert len(ports) == (3 if process == processes[0] else 2), ports
            for port in ports:
                for words in (b"", b"\0\0\0\0", os.urandom(1000)):
                    visits.append(knock(port, words))

    flags = ["--steps", "300", "--metrics", "metrics.jsonl"]
    with intruder("add") as let_loose:
        logs = run_with(tmp_path, flags, "step 20/", visit, [0, 0])
    assert len(visits) == 15
    for visitor in visits:
        visitor.close()
    for number, log in enumerate(logs):
        assert f"process {number} refused a connection from 127.0.0.1 port" in log, log
    (tmp_path / "alone").mkdir()
    ended = run_processes(2, [*TRAIN, *flags], tmp_path / "alone")
    assert ended.codes == [0, 0], ended
    assert losses(tmp_path) == losses(tmp_path / "alone")


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]


def test_different_secrets_are_reported(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        files.append(tmp_path / f"secret-{number}")
        files[-1].touch(0o600)
        files[-1].write_text(secrets.token_hex(32))
    ended = run_processes(2, TRAIN, tmp_path, own=[["--secret-file", str(file)] for file in files])
    assert ended.codes == [1, 1], ended
    for number, log in enumerate(ended.logs):
        assert f"someone without the run's secret wrote meshpipe/nonce/{1 - number} " in log, ended
        assert "give all processes the same secret" in log, ended
