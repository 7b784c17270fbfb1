"""A process that is killed leaves a sentence about itself and what was saved; one that says why it ends leaves none."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from meshpipe.checkpoint import Checkpointer
from meshpipe.processes import last_words
from meshpipe.processes.last_words import saved_sentence
from meshpipe.processes.launch import free_port

PARENT = """
import importlib.util, os, signal, sys, time
spec = importlib.util.spec_from_file_location("last_words", sys.argv[4])  # without JAX
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with module.LastWords(int(sys.argv[1]), sys.argv[2], "run") as words:
    if sys.argv[3] == "said":
        words.withdraw()
    if sys.argv[3] == "stopped":
        words.beat()
        time.sleep(1.5)  # as if it did not run
    if sys.argv[3] != "well":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def words(folder: Path, process: int, coordinator: str, how: str) -> str:
    """What is on standard error after the process is gone; its child holds that open until it has ended as well."""
    # The file is the child's program too, so that a shorter time has to stand in a file.
    program = folder / "last_words.py"
    program.write_text(Path(last_words.__file__).read_text().replace("STOPPED_SECONDS = 5.0", "STOPPED_SECONDS = 1.0"))
    command = [sys.executable, "-c", PARENT, str(process), coordinator, how, str(program)]
    return subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, timeout=60).stderr


def test_a_killed_process_is_named_with_the_newest_checkpoint(tmp_path: Path) -> None:
    for name in ("5", "10", "15.partial", "20.superseded", "25"):
        (tmp_path / "run" / name).mkdir(parents=True)
        if name != "25":
            (tmp_path / "run" / name / "checksums.json").touch()
    saved = "The last good checkpoint is step 10 of run.\n"
    gone = f"127.0.0.1:{free_port()}"
    assert words(tmp_path, 0, gone, "killed") == f"meshpipe: process 0 is gone: it was killed, or it crashed.\n{saved}"
    stops = "meshpipe: process 1 stops because process 0, which coordinates the run, is gone.\n"
    assert words(tmp_path, 1, gone, "killed") == stops + saved
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = f"127.0.0.1:{server.getsockname()[1]}"
        assert words(tmp_path, 1, there, "killed").startswith("meshpipe: process 1 is gone: it was killed")


def test_a_process_that_was_stopped_does_not_blame_process_0(tmp_path: Path) -> None:
    found = words(tmp_path, 1, f"127.0.0.1:{free_port()}", "stopped")
    assert "meshpipe: process 1 stops because it did not run for " in found
    assert "process 0" not in found


@pytest.mark.parametrize("how", ["said", "well"])
def test_nothing_is_left_to_say(how: str, tmp_path: Path) -> None:
    assert words(tmp_path, 1, f"127.0.0.1:{free_port()}", how) == ""


def test_the_newest_checkpoint_is_the_one_that_a_run_would_go_on_from(tmp_path: Path) -> None:
    assert saved_sentence(None) == saved_sentence(str(tmp_path / "none")) == "Nothing was saved."
    with Checkpointer(tmp_path, keep=0) as checkpointer:
        for step in (9, 10):
            checkpointer.save(step, [{"params": {}}], {})
    assert saved_sentence(str(tmp_path)) == f"The last good checkpoint is step {checkpointer.latest()} of {tmp_path}."
