"""Checksums: damage to any file of a checkpoint is found by verify and by restore, and nothing else is opened."""

import json
import os
import shutil

import jax.numpy as jnp
import pytest
from damage import KINDS, damage_each_file, remake_checksums
from saved_trees import shapes, trees

from meshpipe.checkpoint import Checkpointer, CheckpointError, list_checkpoints, verify_checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, trees(), {"seed": 5, "data": {"position": 12}})
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_damage_to_any_file_is_found(saved, kind):
    count = 0
    for name in damage_each_file(saved / "3", kind):
        count += 1
        assert list_checkpoints(saved) == [3]
        problems = verify_checkpoint(saved, 3)
        assert problems, f"{kind} of {name} was not found"
        assert name in problems[0]
        with pytest.raises(CheckpointError, match=r"Step 3 in .* is damaged: "):
            Checkpointer(saved).restore(3, shapes(trees()))
    assert count >= 20
    assert verify_checkpoint(saved, 3) == []


@pytest.mark.parametrize("name", ["extra", "meta/extra", "stage_0/extra", "stage_0/checksums.json", "a/b/c"])
def test_an_additional_file_is_found(saved, tmp_path, name):
    shutil.copytree(saved / "3", tmp_path / "3")
    extra = tmp_path / "3" / name
    extra.parent.mkdir(parents=True, exist_ok=True)
    extra.write_text("?")
    assert verify_checkpoint(tmp_path, 3) == [f"{name} is not part of the checkpoint"]
    with pytest.raises(CheckpointError, match=f"{name} is not part of the checkpoint"):
        Checkpointer(tmp_path).restore(3, shapes(trees()))


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_no_file_is_found_and_not_opened(saved, tmp_path, kind):
    shutil.copytree(saved / "3", tmp_path / "3")
    path = tmp_path / "3" / "meta" / "metadata"
    path.unlink()
    if kind == "link":
        path.symlink_to(saved / "3" / "meta" / "metadata")
    else:
        os.mkfifo(path)
    assert verify_checkpoint(tmp_path, 3) == ["meta/metadata is not a regular file"]


def test_damage_names_the_leaf_and_spares_the_others(saved, tmp_path):
    shutil.copytree(saved / "3", tmp_path / "3")
    (tmp_path / "3" / "stage_0" / "params.layers.0.attention%2Eq.ker%25nel" / "0.0").write_bytes(b"?")
    (problem,) = verify_checkpoint(tmp_path, 3)
    assert problem.endswith("(leaf params/layers/0/attention.q/ker%nel)")
    wanted = shapes(trees())
    with pytest.raises(CheckpointError, match=r"attention.q/ker%nel"):
        Checkpointer(tmp_path).restore(3, wanted)
    del wanted[0]["params"]["layers/0/attention.q/ker%nel"]
    Checkpointer(tmp_path).restore(3, wanted)


FORGERIES = {
    "a folder outside": (lambda document: document["leaves"]["params/layers/1/kernel"].update(item="../../secret")),
    "another format": (lambda document: document.update(format=2)),
    "no leaves": (lambda document: document.pop("leaves")),
    "leaves that are none": (lambda document: document.update(leaves=[1, 2])),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_a_document_that_is_not_ours_is_refused(saved, tmp_path, forge):
    shutil.copytree(saved / "3", tmp_path / "3")
    path = tmp_path / "3" / "meta" / "metadata"
    document = json.loads(path.read_text())
    forge(document)
    path.write_text(json.dumps(document))
    remake_checksums(tmp_path / "3")
    with pytest.raises(CheckpointError, match="Read it with the version that saved it"):
        Checkpointer(tmp_path).restore(3, shapes(trees()))


def test_a_step_under_another_name_is_refused(saved, tmp_path):
    shutil.copytree(saved / "3", tmp_path / "5")
    with pytest.raises(CheckpointError, match="holds step 3"):
        Checkpointer(tmp_path).metadata(5)


def test_a_damaged_step_names_the_newest_good_one(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, [{"params": {"x": jnp.ones(3)}}], {})
    (tmp_path / "3" / "meta" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=r"Step 3 .* is damaged: meta/metadata .*newest good step is 2"):
        Checkpointer(tmp_path).metadata(3)
