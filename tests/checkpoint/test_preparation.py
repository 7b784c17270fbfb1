"""What would make the first save fail is found before the run begins."""

import os
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import pytest

from meshpipe.checkpoint import Checkpointer, CheckpointError


def shape(*sizes, dtype=jnp.float32):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)


def paths(*names):
    return [{"params": {name: shape(3) for name in names}}]


WRONG = {
    "a path too long": (paths("layers/0/" + "x" * 240), {}, "at most 255 bytes, since it names a folder; it has 256"),
    "a path too long in UTF-8": (paths("ü" * 125), {}, "at most 255 bytes"),
    "a path too long once it is escaped": (paths("." * 90), {}, "at most 255 bytes"),
    "a NUL": (paths("a\0b"), {}, "must have no NUL"),
    "half a character": (paths("a\ud800"), {}, "UTF-8"),
    "a typed key": ([{"params": {"k": shape(dtype=jax.random.key(0).dtype)}}], {}, "Save jax.random.key_data"),
    "one path, two shapes": ([*paths("a"), {"params": {"a": shape(4)}}], {}, "must be the same in each"),
    "an object": (paths("a"), {"source": object()}, "must be what JSON can hold"),
    "infinity": (paths("a"), {"clip_norm": float("inf")}, "must be what JSON can hold"),
    "no number": (paths("a"), {"loss": float("nan")}, "must be what JSON can hold"),
    "a list in itself": (paths("a"), {"a": (circle := [])}, "must be what JSON can hold"),
    "1000 levels": (paths("a"), {"a": eval("[" * 150 + "]" * 150)}, "must be what JSON can hold"),
    "more than the disk": ([{"params": {"x": shape(1 << 20, 1 << 20)}}], {}, r"takes 4\.4 TB\. "),
}
circle.append(circle)


@pytest.mark.parametrize(("shapes", "metadata", "reason"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_saved_is_found_first(tmp_path, shapes, metadata, reason):
    with Checkpointer(tmp_path / "run") as checkpointer, pytest.raises(CheckpointError, match=reason):
        checkpointer.prepare(shapes, metadata)
    assert os.listdir(tmp_path) == []


def test_a_folder_made_for_nothing_is_removed(tmp_path):
    """A run that prepares and then fails leaves what was there, and only that."""
    (tmp_path / "there").mkdir()
    for name in ("there", "new/run"):
        with Checkpointer(tmp_path / name) as checkpointer:
            checkpointer.prepare(paths("a"))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["there"]


def test_a_folder_is_kept_for_what_others_put_there(tmp_path):
    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.prepare(paths("a"))
        (tmp_path / "run" / "notes").write_text("mine")
    assert os.listdir(tmp_path / "run") == ["notes"]


def test_a_path_of_a_file_too_long_is_found_first(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 3900:
        folder /= "d" * 100
    with pytest.raises(CheckpointError, match=r"at most 4096 bytes.*shorter path"):
        Checkpointer(folder).prepare(paths("x" * 150))


def test_a_disk_without_room_for_the_files_is_found_first(tmp_path, monkeypatch):
    Status = namedtuple("Status", "f_files f_favail")
    monkeypatch.setattr(os, "statvfs", lambda path: Status(1000, 1))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(1 << 40))
    with pytest.raises(CheckpointError, match="room for the 2 files of one checkpoint"):
        Checkpointer(tmp_path).prepare(paths("a"))


@pytest.mark.parametrize("name", ["file", "file/deep"])
def test_a_folder_that_cannot_be_made_is_found_first(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Name another"):
        Checkpointer(tmp_path / name).prepare(paths("a"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_found_first(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="folder that can be written"):
        Checkpointer(tmp_path).prepare(paths("a"))


def test_what_can_be_saved_is_saved(tmp_path):
    """A path of just as many bytes as a name may have."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.prepare(paths("x" * 248), {"a": 1})
        checkpointer.save(1, [{"params": {"x" * 248: jnp.ones(3)}}], {"a": 1})
    assert checkpointer.steps() == [1]


def test_a_killed_runs_leftovers_make_room(tmp_path):
    (tmp_path / "7.partial").mkdir()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.prepare(paths("a"))
        assert os.listdir(tmp_path) == ["writer.lock"]
