"""A step that vanishes while it is read was pruned, which is no damage; and what is in the way of a save is moved."""

import os
import threading

import jax.numpy as jnp
import pytest

from meshpipe.checkpoint import (
    Checkpointer,
    CheckpointGoneError,
    checksums,
    describe_checkpoint,
    files,
    list_checkpoints,
    reader,
    verify_checkpoint,
)
from meshpipe.checkpoint.files import remove
from meshpipe.cli.checkpoint import checkpoint

TREE = [{"params": {"x": jnp.arange(8.0), "y": jnp.ones(3)}}]


@pytest.fixture
def saved(tmp_path):
    with Checkpointer(tmp_path, keep=0) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, TREE, {})
    return tmp_path


def prune(folder, step):
    """As a run does."""
    deleted = folder / f"{step}.deleted"
    (folder / str(step)).rename(deleted)
    remove(deleted)


READS = {
    "verify": lambda folder: verify_checkpoint(folder, 1),
    "describe": lambda folder: describe_checkpoint(folder, 1),
    "metadata": lambda folder: Checkpointer(folder).metadata(1),
    "restore": lambda folder: Checkpointer(folder).restore(1, TREE),
}


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_step_that_vanishes_at_any_moment_is_gone_and_not_damaged(saved, monkeypatch, read, after):
    """It vanishes before the file of this number is opened."""
    opened = iter(range(1000))
    original = files.open_regular

    def open_regular(path):
        if next(opened) == after:
            prune(saved, 1)
        return original(path)

    monkeypatch.setattr(files, "open_regular", open_regular)
    try:
        read(saved)
    except CheckpointGoneError as error:
        assert "Step 1 was removed" in str(error)  # noqa: PT017
    else:
        assert next(opened) <= after + 1  # it was read before
    assert list_checkpoints(saved) == [1, 2] if next(opened) <= after else [2]


def test_a_step_that_vanishes_before_it_is_opened(saved, monkeypatch):
    load = reader.load_list

    def vanish(folder):
        prune(saved, 1)
        return load(folder)

    monkeypatch.setattr(reader, "load_list", vanish)
    with pytest.raises(CheckpointGoneError):
        verify_checkpoint(saved, 1)


def test_commands_pass_over_a_step_that_has_gone_since_they_listed_it(saved, monkeypatch, capsys):
    import meshpipe.checkpoint as package

    monkeypatch.setattr(package, "list_checkpoints", lambda folder: [0, 1, 2])
    for command, code in (("list", 0), ("verify", 0), ("show", 0)):
        assert checkpoint([command, str(saved)]) == code
    assert "step 0: removed meanwhile" in capsys.readouterr().out
    with pytest.raises(CheckpointGoneError, match=r"Got 0\. Complete steps there: 1, 2"):
        checkpoint(["verify", str(saved), "--step", "0"])


def test_a_step_that_is_replaced_is_not_damaged(saved, monkeypatch):
    load = reader.load_list

    def replace(folder):
        prune(saved, 1)
        (saved / "2").rename(saved / "1")
        return load(folder)

    monkeypatch.setattr(reader, "load_list", replace)
    with pytest.raises(CheckpointGoneError, match="was replaced while it was read"):
        verify_checkpoint(saved, 1)


def test_a_file_that_vanishes_alone_is_damage(saved, monkeypatch):
    original = checksums.read_checked

    def read(path, *rest):
        (saved / "1" / "stage_0" / "params.x" / "0").unlink(missing_ok=True)
        return original(path, *rest)

    monkeypatch.setattr(checksums, "read_checked", read)
    assert verify_checkpoint(saved, 1) == ["stage_0/params.x/0 is missing (leaf params/x)"]


def test_commands_beside_a_run_that_prunes(tmp_path, capsys):
    ended = threading.Event()

    def save():
        with Checkpointer(tmp_path, keep=2) as checkpointer:
            for step in range(1, 2000):
                if ended.is_set():
                    return
                checkpointer.save(step, TREE, {})

    thread = threading.Thread(target=save)
    thread.start()
    try:
        while len(os.listdir(tmp_path)) < 3:
            pass
        for command in ("verify", "list", "show") * 12:
            assert checkpoint([command, str(tmp_path)]) == 0
            output = capsys.readouterr()
            assert output.err == ""
            if command == "verify":
                for line in output.out.splitlines():
                    assert line.endswith(("every byte is good", "removed meanwhile by the run that saves there"))
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("kind", ["link", "broken link", "file", "folder"])
def test_what_is_in_the_way_of_a_save_goes(tmp_path, kind):
    kept = tmp_path / "elsewhere"
    kept.mkdir()
    (kept / "file").write_text("mine")
    folder = tmp_path / "run"
    with Checkpointer(folder, keep=1) as checkpointer:
        checkpointer.save(150, TREE, {})
        checkpointer.wait()
        for name in ("150.deleted", "151.partial"):
            path = folder / name
            if kind == "folder":
                path.mkdir()
                (path / "file").write_text("?")
            elif kind == "file":
                path.write_text("?")
            else:
                path.symlink_to(kept if kind == "link" else "nowhere")
        checkpointer.save(151, TREE, {})
    assert os.listdir(folder) == ["151"]
    assert verify_checkpoint(folder, 151) == []
    assert (kept / "file").read_text() == "mine"


def test_a_step_elsewhere_is_read_and_only_its_link_is_pruned(saved, tmp_path):
    (saved / "2").rename(tmp_path / "archive")
    (saved / "2").symlink_to(tmp_path / "archive")
    assert verify_checkpoint(saved, 2) == []
    with Checkpointer(saved, keep=1) as checkpointer:
        checkpointer.save(3, TREE, {})
    assert checkpointer.steps() == [3]
    assert (tmp_path / "archive" / "checksums.json").is_file()
