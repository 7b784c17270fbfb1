"""One run at a time writes to a folder: the second is told by whom it is in use, and a dead one keeps nobody out."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import pytest
from waiting import LONG, wait_until

from meshpipe.checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointWriteError,
    FolderInUseError,
    lock,
    verify_checkpoint,
)
from meshpipe.checkpoint.lock import LOCK, WriterLock, check_free

TREE = [{"params": {"x": jnp.ones(3)}}]
SHAPES = TREE

HOLD = """
import os, sys, time
from pathlib import Path
from meshpipe.checkpoint.lock import WriterLock
WriterLock.acquire(Path(sys.argv[1]))
if sys.argv[2:] and os.fork():  # what a data loader with worker processes does
    time.sleep(1000)
print("held", flush=True)
time.sleep(1000)
"""


@contextmanager
def another_run(folder, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(LONG)
        process.stdout.close()


def test_the_second_run_is_told_whose_the_folder_is(tmp_path, capfd):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, TREE, {})
    half = tmp_path / "2.partial"
    with another_run(tmp_path) as other:
        half.mkdir()  # what the other is writing
        second = Checkpointer(tmp_path)
        owner = rf"in use by process {other.pid} on {socket.gethostname()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        for action in (lambda: second.save(2, TREE, {}), lambda: second.prepare(SHAPES), lambda: check_free(tmp_path)):
            with pytest.raises(FolderInUseError, match=owner):
                action()
        # Readers need no lock.
        assert second.steps() == [1]
        assert verify_checkpoint(tmp_path, 1) == []
        second.restore(1, TREE)
        second.close()
    assert half.exists()
    with Checkpointer(tmp_path) as checkpointer:  # it was killed, so its lock counts no more
        checkpointer.save(2, TREE, {})
    assert "waiting" not in capfd.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_children_of_a_dead_run_keep_nobody_out(tmp_path):
    with another_run(tmp_path, "with a child") as other:
        with pytest.raises(FolderInUseError):
            WriterLock.acquire(tmp_path)
        other.kill()
        other.wait(LONG)
        WriterLock.acquire(tmp_path).release()
    assert os.listdir(tmp_path) == []


def test_a_killed_run_whose_number_another_process_has_is_replaced(tmp_path, capfd):
    note = {"token": "x", "host": socket.gethostname(), "boot": lock._boot(), "process": os.getppid(), "since": 1}
    (tmp_path / LOCK).write_text(json.dumps(note))
    WriterLock.acquire(tmp_path).release()
    assert "waiting" not in capfd.readouterr().err


def note_of_another_host(folder):
    note = {"token": "x", "host": "node7", "boot": "another", "process": 12, "since": 1_700_000_000}
    (folder / LOCK).write_text(json.dumps(note))


def test_a_run_on_another_host_is_alive_as_long_as_it_beats(tmp_path, monkeypatch, capfd):
    """Also where the file system gives locks to each host separately."""
    monkeypatch.setattr(lock, "DEAD_SECONDS", LONG)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    note_of_another_host(tmp_path)
    ended = threading.Event()

    def beat():
        while not ended.wait(0.2):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(FolderInUseError, match="in use by process 12 on node7, since 2023-11-1"):
            Checkpointer(tmp_path).prepare(SHAPES)
    finally:
        ended.set()
        thread.join()
    assert "was in use by process 12 on node7" in capfd.readouterr().err
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.5)
    Checkpointer(tmp_path).prepare(SHAPES)


def test_the_lock_of_a_living_run_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    held = WriterLock.acquire(tmp_path)
    before = (tmp_path / LOCK).stat().st_mtime_ns
    wait_until(lambda: (tmp_path / LOCK).stat().st_mtime_ns != before)
    held.release()
    assert os.listdir(tmp_path) == []


def test_a_run_that_was_taken_for_dead_publishes_nothing_more(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, TREE, {})
    checkpointer.wait()
    publish = checkpointer._publish

    def late(partial):
        note_of_another_host(tmp_path)  # in the same file, as a host does that sees no lock
        publish(partial)

    monkeypatch.setattr(checkpointer, "_publish", late)
    checkpointer.save(2, TREE, {})
    with pytest.raises(CheckpointWriteError, match=r"another run has taken .* meanwhile.*The newest step there is 1"):
        checkpointer.close()
    assert checkpointer.steps() == [1]
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "node7"  # which is not ours to remove


def test_checkpointers_of_one_program_share_the_folder(tmp_path):
    first, second = Checkpointer(tmp_path), Checkpointer(tmp_path)
    first.save(1, TREE, {})
    first.wait()
    second.save(2, TREE, {})
    second.wait()
    first.close()
    assert LOCK in os.listdir(tmp_path)
    second.close()
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_two_saves_of_one_step_in_one_program(tmp_path, monkeypatch):
    go = threading.Event()
    first, second = Checkpointer(tmp_path), Checkpointer(tmp_path)
    publish = first._publish
    monkeypatch.setattr(first, "_publish", lambda partial: (go.wait(LONG), publish(partial)))
    first.save(1, TREE, {})
    with pytest.raises(CheckpointError, match="Another Checkpointer of this program is writing step 1"):
        second.save(1, TREE, {})
    go.set()
    first.close()
    second.close()
    assert verify_checkpoint(tmp_path, 1) == []


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_lock_that_is_no_file_is_refused(tmp_path, kind):
    path: Path = tmp_path / "run" / LOCK
    path.parent.mkdir()
    if kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(CheckpointError, match="folder that can be written"):
        Checkpointer(path.parent).prepare(SHAPES)
    with pytest.raises(CheckpointWriteError, match="could not be written"):
        Checkpointer(path.parent).save(1, TREE, {})
    assert os.listdir(tmp_path) == ["run"]


NOTES = ["", "[" * 1000, "{}", '{"host": "\\u001b[2J", "process": 1, "since": 1}', '{"host": "a", "process": 1.5}']


@pytest.mark.parametrize("text", NOTES)
def test_a_note_that_says_nothing_names_nobody(tmp_path, text, monkeypatch):
    monkeypatch.setattr(lock, "DEAD_SECONDS", 0.1)
    with another_run(tmp_path):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(FolderInUseError, match="in use by a run that has not said who it is"):
            check_free(tmp_path)
    (tmp_path / LOCK).write_text(text)
    WriterLock.acquire(tmp_path).release()
