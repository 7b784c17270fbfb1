"""A killed process leaves a message with the newest checkpoint; one that reports its own exit leaves none."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
from waiting import LONG

from meshpipe.checkpoint import Checkpointer
from meshpipe.processes import exit_reporter
from meshpipe.processes.exit_reporter import saved_sentence

PARENT = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("exit_reporter", sys.argv[4])  # without JAX
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.ExitReporter(int(sys.argv[1]), sys.argv[2], "run") as reporter:
    if sys.argv[3] == "cancelled":
        reporter.cancel()
    if sys.argv[3] == "stopped":
        reporter.heartbeat()
    if sys.argv[3] != "well":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def save(folder: Path, *steps: int) -> None:
    with Checkpointer(folder, keep=0) as checkpointer:
        for step in steps:
            checkpointer.save(step, [{"params": {"x": jnp.ones(3)}}], {})


def reported(folder: Path, process: int, coordinator: str, how: str) -> str:
    """The standard error of the process; its child keeps it open until it has ended too."""
    # The child runs this file, so its clock must be written into a copy of it: whenever it looks at it, so many seconds
    # have passed.
    seconds = 7.0 if how == "stopped" else 0.0
    clock = f"import itertools\nimport time\n\nclock = itertools.count(0.0, {seconds})\n"
    source = Path(exit_reporter.__file__).read_text()
    program = folder / "exit_reporter.py"
    program.write_text(source.replace("import time\n", clock).replace("time.monotonic()", "next(clock)"))
    command = [sys.executable, "-c", PARENT, str(process), coordinator, how, str(program)]
    return subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, timeout=LONG).stderr


@pytest.fixture
def gone() -> Iterator[str]:
    """An address at which nobody listens, and nobody else can."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_killed_process_is_named_with_the_newest_checkpoint(gone: str, tmp_path: Path) -> None:
    for name in ("15.partial", "20.superseded", "25"):
        (tmp_path / "run" / name).mkdir(parents=True)
    save(tmp_path / "run", 5, 10)
    saved = "The newest checkpoint is step 10 of run.\n"
    assert (
        reported(tmp_path, 0, gone, "killed") == f"meshpipe: process 0 is gone: it was killed, or it crashed.\n{saved}"
    )
    stops = "meshpipe: process 1 stops because process 0, which coordinates the run, is gone.\n"
    assert reported(tmp_path, 1, gone, "killed") == stops + saved
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        assert reported(tmp_path, 1, there, "killed").startswith("meshpipe: process 1 is gone: it was killed")


def test_a_process_that_was_stopped_does_not_blame_process_0(gone: str, tmp_path: Path) -> None:
    found = reported(tmp_path, 1, gone, "stopped")
    assert "meshpipe: process 1 stops because it did not run for " in found
    assert "process 0" not in found


@pytest.mark.parametrize("how", ["cancelled", "well"])
def test_a_cancelled_reporter_prints_nothing(how: str, gone: str, tmp_path: Path) -> None:
    assert reported(tmp_path, 1, gone, how) == ""


def test_the_newest_checkpoint_is_the_one_a_run_would_resume_from(tmp_path: Path) -> None:
    assert saved_sentence(None) == saved_sentence(str(tmp_path / "none")) == "Nothing was saved."
    save(tmp_path, 9, 10)
    assert (
        saved_sentence(str(tmp_path))
        == f"The newest checkpoint is step {Checkpointer(tmp_path).latest()} of {tmp_path}."
    )


def without_checksums(step: Path) -> Path:
    (step / "checksums.json").unlink()
    return step / "checksums.json"


DAMAGE = {
    "a file is missing": lambda step: (step / "stage_0" / "params.x" / "0").unlink(),
    "a file is shorter": lambda step: (step / "stage_0" / "params.x" / "0").write_bytes(b"1"),
    "infinity": lambda step: (step / "checksums.json").write_text('{"files": {"a": [Infinity, 1]}, "crc32": 1}'),
    "another number": lambda step: replace(step / "checksums.json", '": [', '": [1'),
    "nested": lambda step: (step / "checksums.json").write_text("[" * 100_000),
    "no object": lambda step: (step / "checksums.json").write_text("[1, 2]"),
    "a pipe": lambda step: os.mkfifo(without_checksums(step)),
    "a link": lambda step: without_checksums(step).symlink_to("/dev/zero"),
    "2 GB": lambda step: os.truncate(step / "checksums.json", 2 << 30),
}


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_step_is_not_named(damage: Callable[[Path], object], tmp_path: Path) -> None:
    save(tmp_path, 9, 10)
    damage(tmp_path / "10")
    assert saved_sentence(str(tmp_path)) == f"The newest checkpoint is step 9 of {tmp_path}."
