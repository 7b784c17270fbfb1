"""Checkpoints: exact, whole or not listed, found damaged when damaged, and restored onto other layouts."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from saved_trees import assert_same, on, shapes, trees
from waiting import LONG, wait_until

from meshpipe.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    CheckpointWriteError,
    checksums,
    describe_checkpoint,
    files,
    index,
    list_checkpoints,
    verify_checkpoint,
)
from meshpipe.mesh import make_mesh, submeshes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, trees(), {"seed": 5, "data": {"position": 12}})
    return folder


def test_restore_gives_back_every_bit_and_sharding(saved):
    checkpointer = Checkpointer(saved)
    found = checkpointer.restore(3, shapes(trees()))
    assert_same(found, trees())
    kernel = found[0]["params"]["layers/0/attention.q/ker%nel"]
    assert kernel.sharding.is_equivalent_to(trees()[0]["params"]["layers/0/attention.q/ker%nel"].sharding, 2)
    assert checkpointer.metadata(3) == {"seed": 5, "data": {"position": 12}}


def test_restore_onto_another_partition_and_mesh(saved):
    (mesh,) = submeshes(make_mesh(tensor=4))
    first, second, _ = trees()
    whole = [{section: {**first[section], **second[section]} for section in first}]
    assert_same(Checkpointer(saved).restore(3, shapes(whole, mesh)), whole)


def test_restoring_some_leaves_reads_only_their_files_and_each_once(saved, monkeypatch):
    read = []
    original = files.read_checked
    monkeypatch.setattr(
        checksums,
        "read_checked",
        lambda path, *rest: (read.append(path.relative_to(saved / "3").as_posix()), original(path, *rest))[1],
    )
    wanted = {"layers/1/kernel": shapes(trees())[1]["params"]["layers/1/kernel"]}
    found = Checkpointer(saved).restore(3, [{"params": wanted}])
    assert list(found[0]["params"]) == ["layers/1/kernel"]
    assert sorted(read) == [
        *("meta/metadata", "stage_0/_METADATA", "stage_1/_METADATA"),
        *(f"stage_1/params.layers.1.kernel/{name}" for name in (".zarray", "0.0", "1.0")),
    ]


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    (mesh,) = submeshes(make_mesh(data=2))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    array = on(mesh, np.arange(1 << 20, dtype=np.float32))
    expected = np.asarray(array)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [{"params": {"x": array}}], {})
        for _ in range(3):
            array = overwrite(array)
        array.block_until_ready()
        checkpointer.wait()
        found = checkpointer.restore(1, [{"params": {"x": shapes(array)}}])
    np.testing.assert_array_equal(found[0]["params"]["x"], expected)


def test_keep_removes_the_oldest(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 2, 5, 9):
            checkpointer.save(step, [{"params": {"x": jnp.ones(3)}}], {})
    assert sorted(os.listdir(tmp_path)) == ["5", "9"]
    assert list_checkpoints(tmp_path) == [5, 9]


def test_what_is_not_whole_is_not_listed_and_is_cleared_by_the_next_save(tmp_path):
    for name in ("7", "8.partial", "8.partial.orbax-checkpoint-tmp", "4.deleted"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes").mkdir()
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.steps() == []
    assert checkpointer.latest() is None
    assert len(os.listdir(tmp_path)) == 5  # reading leaves everything alone
    checkpointer.save(9, [{"params": {"x": jnp.ones(3)}}], {})
    checkpointer.close()
    assert sorted(os.listdir(tmp_path)) == ["7", "9", "notes"]


def test_a_reader_makes_no_folder(tmp_path):
    checkpointer = Checkpointer(tmp_path / "none")
    assert checkpointer.steps() == []
    checkpointer.close()
    assert os.listdir(tmp_path) == []


@contextmanager
def file_size_limit(size):
    """Writing beyond it fails as it does on a full disk, also for root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("surfaces_in", ["wait", "save", "close"])
def test_a_save_that_fails_is_told_and_leaves_the_others_alone(tmp_path, surfaces_in):
    large = [{"params": {"x": jnp.ones(1 << 18)}}]
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, [{"params": {"x": jnp.ones(3)}}], {})
    checkpointer.wait()
    with file_size_limit(1 << 16):
        checkpointer.save(2, large, {})
        wait_until(lambda: checkpointer._writing[1].done())
    with pytest.raises(CheckpointWriteError, match=r"Step 2 could not be written to .*The newest step there is 1\."):
        checkpointer.save(3, large, {}) if surfaces_in == "save" else getattr(checkpointer, surfaces_in)()
    assert sorted(os.listdir(tmp_path)) == ["1", "writer.lock"][: 1 if surfaces_in == "close" else 2]
    assert verify_checkpoint(tmp_path, 1) == []
    if surfaces_in != "close":
        checkpointer.save(2, large, {})
        checkpointer.close()
        assert checkpointer.steps() == [1, 2]
        assert verify_checkpoint(tmp_path, 2) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError, match="Step 1 could not be written"):
        Checkpointer(tmp_path / "file" / "deep").save(1, [{"params": {"x": jnp.ones(3)}}], {})


def test_a_step_is_never_listed_while_it_is_removed(tmp_path, monkeypatch):
    seen = []

    def broken(path, **options):
        seen.extend(list_checkpoints(tmp_path))
        raise PermissionError("may not be removed")

    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, [{"params": {"x": jnp.ones(3)}}], {})
    checkpointer.save(2, [{"params": {"x": jnp.ones(3)}}], {})
    monkeypatch.setattr(shutil, "rmtree", broken)
    with pytest.raises(CheckpointWriteError, match=r"Step 2 is saved in .* older ones remain: may not be removed"):
        checkpointer.close()
    monkeypatch.undo()
    assert seen == [2]
    assert sorted(os.listdir(tmp_path)) == ["1.deleted", "2"]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, [{"params": {"x": jnp.ones(3)}}], {})
    assert sorted(os.listdir(tmp_path)) == ["2", "3"]


def test_wrong_shapes_dtypes_and_leaves_are_refused(saved):
    (mesh,) = submeshes(make_mesh())
    place = NamedSharding(mesh, PartitionSpec())

    def restore(path, shape, dtype):
        wanted = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=place)}
        return Checkpointer(saved).restore(3, [{"params": wanted}])

    with pytest.raises(CheckpointError, match=r"layers/9/kernel is not in step 3"):
        restore("layers/9/kernel", (8, 8), jnp.float32)
    with pytest.raises(CheckpointError, match=r"layers/1/kernel is float32\[8, 8\].*asked for float32\[8, 4\]"):
        restore("layers/1/kernel", (8, 4), jnp.float32)
    with pytest.raises(CheckpointError, match=r"asked for bfloat16"):
        restore("layers/1/kernel", (8, 8), jnp.bfloat16)
    with pytest.raises(CheckpointError, match=r"Got 4. Complete steps there: 3"):
        Checkpointer(saved).restore(4, [])


def deleted():
    array = jnp.ones(3)
    array.delete()
    return array


WRONG_SAVES = {
    "metadata that JSON cannot hold": ({"metadata": {"bad": object()}}, "JSON"),
    "negative step": ({"step": -1}, "must be at least 0. Got -1"),
    "array of NumPy": ({"leaf": np.ones(3)}, "params/x is a ndarray. Use jnp.asarray"),
    "number": ({"leaf": 3.0}, "params/x is a float. Use jnp.asarray"),
    "typed key": ({"leaf": jax.random.key(0)}, "Save jax.random.key_data of it"),
    "donated array": ({"leaf": deleted()}, "params/x was donated or deleted"),
    "path too long": ({"path": "x" * 249}, "must have at most 255 bytes"),
    "leaf of two shapes": (
        {"second": jnp.ones(4)},
        r"params/x is float32\[3\] in stage_0, and float32\[4\] in stage_1",
    ),
}


@pytest.mark.parametrize(("call", "reason"), WRONG_SAVES.values(), ids=WRONG_SAVES)
def test_wrong_saves_are_refused_before_anything_is_written(tmp_path, call, reason):
    given = {"step": 1, "leaf": jnp.ones(3), "second": None, "path": "x", "metadata": {}} | call
    stages = [{"params": {given["path"]: leaf}} for leaf in (given["leaf"], given["second"]) if leaf is not None]
    with pytest.raises(CheckpointError, match=reason):
        Checkpointer(tmp_path / "run").save(given["step"], stages, given["metadata"])
    assert os.listdir(tmp_path) == []


def test_saves_that_are_not_newer_or_have_no_place_are_refused(tmp_path):
    tree = [{"params": {"x": jnp.ones(3)}}]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, tree, {})
        for step in (5, 4):
            with pytest.raises(CheckpointError, match="must be newer"):
                checkpointer.save(step, tree, {})
        (tmp_path / "6").mkdir()
        (tmp_path / "6" / "notes").write_text("mine")
        with pytest.raises(CheckpointError, match="6 is in the way"):
            checkpointer.save(6, tree, {})
    assert (tmp_path / "6" / "notes").read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"a file\. Name another"):
        Checkpointer(tmp_path / "6" / "notes").save(1, tree, {})
    with pytest.raises(CheckpointError, match="Mount the storage"):
        Checkpointer("gs://bucket/run")
    with pytest.raises(CheckpointError, match="keep must be at least 0"):
        Checkpointer(tmp_path, keep=-1)


def test_restore_takes_arrays_and_shapes_without_a_sharding(saved):
    bias = trees()[1]["params"]["layers/1/kernel"]
    for like in (bias, jnp.zeros((8, 8)), jax.ShapeDtypeStruct((8, 8), jnp.float32)):
        [tree] = Checkpointer(saved).restore(3, [{"params": {"layers/1/kernel": like}}])
        found = tree["params"]["layers/1/kernel"]
        np.testing.assert_array_equal(found, bias)
        assert found.devices() == (like.devices() if isinstance(like, jax.Array) else {jax.devices()[0]})


@pytest.mark.parametrize(("name", "reason"), [("missing", "is not a folder"), ("", "has none")])
def test_listing_where_there_is_nothing_says_so(tmp_path, name, reason):
    with pytest.raises(CheckpointError, match=reason):
        list_checkpoints(tmp_path / name)


def test_description(saved):
    info = describe_checkpoint(saved, 3)
    assert info.step == 3
    assert info.bytes == Checkpointer(saved).bytes_of(3) > index.tree_bytes(shapes(trees())) > 64 * 4
    kernel = {"item": "stage_1", "shape": [8, 8], "dtype": "float32", "chunks": [4, 8]}
    assert info.leaves["params/layers/1/kernel"] == kernel
    assert abs(info.saved_at - time.time()) < 3600


@pytest.mark.parametrize(
    "options",
    [
        {"resume": True},
        {"checkpoint_every": 5},
        {"checkpoint_dir": " "},
        {"checkpoint_dir": "x", "checkpoint_keep": -1},
    ],
)
def test_config_that_cannot_be(options):
    with pytest.raises(ValueError, match="`"):
        CheckpointConfig(**options).check_folder_given()


def start(code, *arguments, **pipes):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, env=environment, **pipes)


SAVE_AND_LEAVE = """
import sys, jax.numpy as jnp
from meshpipe.checkpoint import Checkpointer
def train():
    checkpointer = Checkpointer(sys.argv[1])
    for step in (1, 2):
        checkpointer.save(step, [{"params": {"x": jnp.ones(1 << 22)}}] * 2, {})
train()
"""


def test_a_program_that_ends_without_close_is_told_so_and_nothing_else_is_printed(tmp_path):
    process = start(SAVE_AND_LEAVE, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.communicate(timeout=LONG)[0]
    steps = list_checkpoints(tmp_path)
    if steps == [1, 2]:  # it was quick enough
        assert output == ""
    else:
        assert steps == [1]
        assert output.startswith("meshpipe: Step 2 could not be written"), output
        assert output.endswith("Call close() on a Checkpointer before the program ends.\n"), output
        assert os.listdir(tmp_path) == ["1"]


SAVE_UNTIL_KILLED = """
import sys, jax, jax.numpy as jnp
from meshpipe.checkpoint import Checkpointer
with Checkpointer(sys.argv[1], keep=2) as checkpointer:
    for step in range(1, 1000):
        checkpointer.save(step, [{"params": {"x": jnp.full((1 << 18,), step, jnp.float32)}}], {"step": step})
        print(step, flush=True)
"""


MOMENTS = [0.0, 0.13, 0.31]
MORE_MOMENTS = np.random.default_rng(0).uniform(0, 0.5, 20).round(3)


@pytest.mark.parametrize("seconds", [*MOMENTS, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE_MOMENTS)])
def test_a_kill_during_a_save_leaves_whole_steps_only(tmp_path, seconds):
    log = (tmp_path / "log").open("w+")
    process = start(SAVE_UNTIL_KILLED, tmp_path / "run", stdout=subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[-1].strip() == "4", Path(log.name).read_text()
        time.sleep(seconds)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(LONG)
        process.stdout.close()
        log.close()
    checkpointer = Checkpointer(tmp_path / "run")
    assert checkpointer.steps()
    assert checkpointer.latest() >= 3
    for step in checkpointer.steps():
        assert verify_checkpoint(tmp_path / "run", step) == []
        place = jnp.ones(()).sharding
        found = checkpointer.restore(
            step, [{"params": {"x": jax.ShapeDtypeStruct((1 << 18,), jnp.float32, sharding=place)}}]
        )
        assert set(np.asarray(found[0]["params"]["x"])) == {float(step)}
        assert checkpointer.metadata(step) == {"step": step}
    checkpointer.save(checkpointer.latest() + 1, [{"params": {"x": jnp.ones(3)}}], {})
    checkpointer.close()
    assert all(name.isdigit() for name in os.listdir(tmp_path / "run"))


def test_metadata_is_data(saved):
    document = json.loads((saved / "3" / "meta" / "metadata").read_text())
    assert document["user"] == {"seed": 5, "data": {"position": 12}}
