"""Files that processes write themselves are those that Orbax writes, and each process knows which of them it needs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from saved_trees import assert_same, on, shapes, trees

from meshpipe.checkpoint import Checkpointer, CheckpointError
from meshpipe.checkpoint.checksums import write_checksums, write_files
from meshpipe.checkpoint.index import index_leaves
from meshpipe.checkpoint.items import quiet_orbax, read_arrays
from meshpipe.checkpoint.shards import all_files, document_files, files_to_read, own_files
from meshpipe.mesh import make_mesh, submeshes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(3, trees(), {"seed": 5})
    return folder / "3"


def test_the_files_are_those_of_orbax(saved):
    index, items = index_leaves(trees())
    document = json.loads((saved / "meta" / "metadata").read_text())
    assert document["leaves"] == index
    own = {**own_files(items), **document_files(document)}
    assert own_files(items).keys() == all_files(index)
    by_orbax = {p.relative_to(saved).as_posix(): p.read_bytes() for p in saved.rglob("*") if p.is_file()}
    additional = {name for name in by_orbax if "commit_success" in name} | {"_CHECKPOINT_METADATA", "checksums.json"}
    assert own.keys() == by_orbax.keys() - additional
    for name, content in own.items():
        if name.rpartition("/")[2] in (".zarray", "_METADATA", "metadata"):
            assert json.loads(content) == json.loads(by_orbax[name]), name
        else:
            assert bytes(content) == by_orbax[name], name


TYPES = [jnp.bfloat16, jnp.float8_e4m3fn, jnp.float16, jnp.int8, jnp.uint32, jnp.bool_, jnp.complex64]


def test_orbax_reads_the_files(tmp_path):
    arrays = {jnp.dtype(kind).name: jnp.arange(6).astype(kind).reshape(2, 3) for kind in TYPES}
    index, items = index_leaves([{"params": arrays}])
    write_files(tmp_path, {**own_files(items), **document_files({"leaves": index})})
    with quiet_orbax():
        found = read_arrays(tmp_path / "stage_0", shapes(items["stage_0"]))
    assert_same(found, items["stage_0"])


def test_bytes_do_not_change_with_donated_arrays():
    (mesh,) = submeshes(make_mesh(data=2))
    array = on(mesh, np.arange(1 << 18, dtype=np.float32), "data")
    expected = np.asarray(array).tobytes()
    files = own_files({"stage_0": {"params/x": array}})
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    for _ in range(3):
        array = overwrite(array)
    array.block_until_ready()
    assert b"".join(files[f"stage_0/params.x/{i}"] for i in range(2)) == expected


def test_files_to_read():
    (mesh,) = submeshes(make_mesh(data=2, tensor=2))

    def wanted(*spec, shape=(8, 8)):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    assert files_to_read({"chunks": [8, 4]}, wanted("data")) == {".zarray", "0.0", "0.1"}
    assert files_to_read({"chunks": []}, wanted(shape=())) == {".zarray", "0"}
    assert files_to_read({}, wanted()) is None
    assert files_to_read({"chunks": [0, 8]}, wanted(shape=(0, 8))) is None


FORGED_CHUNKS = [[4], [4, 8, 1], [0, 8], [16, 8], [4.0, 8], "48", {"4": 8}]


@pytest.mark.parametrize("chunks", FORGED_CHUNKS, ids=str)
def test_chunks_that_cannot_be_are_refused(chunks, tmp_path):
    x = jnp.zeros((8, 8))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [{"params": {"x": x}}], {})
    file = tmp_path / "1" / "meta" / "metadata"
    document = json.loads(file.read_text())
    document["leaves"]["params/x"]["chunks"] = chunks
    file.write_text(json.dumps(document))
    write_checksums(tmp_path / "1")
    with pytest.raises(CheckpointError, match="Read it with the version that saved it"):
        Checkpointer(tmp_path).restore(1, [{"params": {"x": x}}])


def test_a_checkpoint_without_chunks_is_read(saved, tmp_path):
    """As versions wrote it that knew one process only."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [{"params": {"x": jnp.arange(8.0)}}], {})
    file = tmp_path / "1" / "meta" / "metadata"
    document = json.loads(file.read_text())
    del document["leaves"]["params/x"]["chunks"]
    file.write_text(json.dumps(document))
    write_checksums(tmp_path / "1")
    [tree] = Checkpointer(tmp_path).restore(1, [{"params": {"x": jnp.zeros(8)}}])
    np.testing.assert_array_equal(tree["params"]["x"], np.arange(8.0))
