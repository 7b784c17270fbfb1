"""Checkpoints: exact, whole or not listed, found damaged when damaged, and restored onto other layouts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe.checkpoint import (
    CheckpointConfig,
    Checkpointer,
    CheckpointError,
    describe_checkpoint,
    list_checkpoints,
    verify_checkpoint,
)
from meshpipe.mesh import make_mesh, submeshes


def on(mesh, value, *spec):
    return jax.device_put(jnp.asarray(value), NamedSharding(mesh, PartitionSpec(*spec)))


def trees(offset=0.0):
    """Two stages on their own submeshes of 2 x 2 devices, with every kind of leaf that occurs."""
    first, second = submeshes(make_mesh(pipeline=2, data=2, tensor=2))
    values = np.arange(64, dtype=np.float32).reshape(8, 8) + offset
    return [
        {
            "params": {
                "layers/0/attention.q/ker%nel": on(first, values, None, "tensor"),
                "layers/0/bias": on(first, values[0].astype(jnp.bfloat16)),
                "layers/0/odd": on(first, np.array([np.nan, -0.0, np.inf], np.float16)),
            },
            "state": {"layers/0/count": on(first, np.uint32(7)), "layers/0/mask": on(first, np.array([True, False]))},
            "optimizer": {"0/count": on(first, np.int32(3)), "0/mu/layers/0/bias": on(first, values[1])},
        },
        {
            "params": {
                "layers/1/kernel": on(second, values * 2, "tensor"),
                "layers/1/empty": on(second, np.zeros((0, 3))),
            },
            "state": {},
            "optimizer": {"0/count": on(second, np.int32(3))},
        },
        {"params": {}, "state": {}, "optimizer": {}},
    ]


def shapes(of, mesh=None):
    def shape(leaf):
        sharding = leaf.sharding if mesh is None else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, of)


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


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


def test_restoring_some_leaves_reads_only_their_stage(saved, monkeypatch):
    read = []
    original = ocp.PyTreeCheckpointHandler.restore
    monkeypatch.setattr(
        ocp.PyTreeCheckpointHandler,
        "restore",
        lambda self, folder, args: read.append(folder.name) or original(self, folder, args=args),
    )
    wanted = {"layers/1/kernel": shapes(trees())[1]["params"]["layers/1/kernel"]}
    found = Checkpointer(saved).restore(3, [{"params": wanted}])
    assert list(found[0]["params"]) == ["layers/1/kernel"]
    assert read == ["stage_1"]


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


def test_a_save_that_fails_is_told_and_leaves_the_others_alone(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, [{"params": {"x": jnp.ones(3)}}], {})
    checkpointer.wait()
    (tmp_path / "2").write_text("in the way of the final name")
    checkpointer.save(2, [{"params": {"x": jnp.ones(3)}}], {})
    with pytest.raises(OSError, match="2"):
        checkpointer.wait()
    assert checkpointer.steps() == [1]
    assert verify_checkpoint(tmp_path, 1) == []
    checkpointer.save(3, [{"params": {"x": jnp.ones(3)}}], {})
    checkpointer.close()
    assert checkpointer.steps() == [1, 3]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_found(saved, tmp_path, damage):
    files = sorted(p.relative_to(saved) for p in saved.rglob("*") if p.is_file())
    assert len(files) >= 20
    for name in files:
        content = (saved / name).read_bytes()
        path = saved / name
        try:
            if damage == "remove":
                path.unlink()
            elif damage == "truncate" or not content:
                path.write_bytes(content[:-1] if content else b"x")
            else:
                flipped = bytearray(content)
                flipped[len(content) // 2] ^= 1
                path.write_bytes(flipped)
            if name.name == "checksums.json" and damage == "remove":
                assert Checkpointer(saved).steps() == []  # without its checksums it is no checkpoint
                continue
            problems = verify_checkpoint(saved, 3)
            assert problems, f"{damage} of {name} was not found"
            assert name.name in problems[0]
            if str(name).startswith(("stage_", "meta", "checksums")):
                with pytest.raises(CheckpointError, match="damaged"):
                    Checkpointer(saved).restore(3, shapes(trees()))
        finally:
            path.write_bytes(content)
    assert verify_checkpoint(saved, 3) == []


def test_an_additional_file_is_found(saved):
    extra = saved / "3" / "stage_0" / "extra"
    extra.write_text("?")
    try:
        assert "extra" in verify_checkpoint(saved, 3)[0]
    finally:
        extra.unlink()


def test_a_damaged_step_names_the_newest_good_one(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, [{"params": {"x": jnp.ones(3)}}], {})
    (tmp_path / "3" / "meta" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match=r"Step 3 .* is damaged: meta/metadata .*newest good step is 2"):
        Checkpointer(tmp_path).metadata(3)


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
    with pytest.raises(CheckpointError, match=r"Got 4. Whole steps there: 3"):
        Checkpointer(saved).restore(4, [])


def test_wrong_saves_are_refused_before_anything_is_written(tmp_path):
    checkpointer = Checkpointer(tmp_path / "run")
    with pytest.raises(TypeError, match="JSON"):
        checkpointer.save(1, [{"params": {"x": jnp.ones(3)}}], {"bad": object()})
    assert os.listdir(tmp_path) == []
    checkpointer.save(5, [{"params": {"x": jnp.ones(3)}}], {})
    for step in (5, 4):
        with pytest.raises(CheckpointError, match="must be newer"):
            checkpointer.save(step, [{"params": {"x": jnp.ones(3)}}], {})
    checkpointer.close()


@pytest.mark.parametrize(("name", "reason"), [("missing", "is not a folder"), ("", "has none")])
def test_listing_where_there_is_nothing_says_so(tmp_path, name, reason):
    with pytest.raises(CheckpointError, match=reason):
        list_checkpoints(tmp_path / name)


def test_description(saved):
    info = describe_checkpoint(saved, 3)
    assert info.step == 3
    assert info.bytes > 64 * 4
    assert info.leaves["params/layers/1/kernel"] == {"item": "stage_1", "shape": [8, 8], "dtype": "float32"}
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
    with pytest.raises(ValueError, match="--"):
        CheckpointConfig(**options)


SAVE_UNTIL_KILLED = """
import sys, jax, jax.numpy as jnp
from meshpipe.checkpoint import Checkpointer
with Checkpointer(sys.argv[1], keep=2) as checkpointer:
    for step in range(1, 1000):
        checkpointer.save(step, [{"params": {"x": jnp.full((1 << 18,), step, jnp.float32)}}], {"step": step})
        print(step, flush=True)
"""


@pytest.mark.parametrize("seconds", [0.0, 0.13, 0.31])
def test_a_kill_during_a_save_leaves_whole_steps_only(tmp_path, seconds):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-c", SAVE_UNTIL_KILLED, str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[-1].strip() == "4", Path(log.name).read_text()
        time.sleep(seconds)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
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
