"""Orbax alone reads what is saved, and what earlier versions had Orbax write is still read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax_files import restore_item, save
from saved_trees import assert_same, on, shapes, trees

from meshpipe.checkpoint import Checkpointer, describe_checkpoint, index, verify_checkpoint
from meshpipe.checkpoint.names import directory_name
from meshpipe.mesh import make_mesh, submeshes

TYPES = [
    *(jnp.bfloat16, jnp.float8_e4m3fn, jnp.float16, jnp.int8, jnp.int4, jnp.uint32, jnp.bool_, jnp.complex64),
    jnp.float32,
]


def by_folder(leaves):
    return {directory_name(key): leaf for key, leaf in leaves.items()}


def test_orbax_alone_restores_every_stage(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, trees(), {"seed": 5})
    for item, leaves in index.index_leaves(trees())[1].items():
        named = by_folder(leaves)
        assert_same(restore_item(tmp_path / "3" / item, shapes(named)), named)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: jnp.dtype(kind).name)
def test_every_dtype_is_read_by_orbax_and_by_us(kind, tmp_path):
    array = jnp.arange(6).astype(kind).reshape(2, 3)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [{"params": {"x": array}}], {})
        checkpointer.wait()
        [tree] = checkpointer.restore(1, [{"params": {"x": array}}])
    assert_same(tree["params"]["x"], array)
    assert_same(restore_item(tmp_path / "1" / "stage_0", {"params.x": shapes(array)})["params.x"], array)


def test_orbax_reads_arrays_in_many_chunks(tmp_path, monkeypatch):
    """Also the last chunk, filled up with zeros, of a dim that no number divides."""
    monkeypatch.setattr(index, "LARGEST_CHUNK", 256)
    (mesh,) = submeshes(make_mesh(data=2, tensor=2))
    values = np.arange(37 * 8, dtype=np.float32).reshape(37, 8)
    arrays = {"odd": on(mesh, values, None, "tensor"), "even": on(mesh, values[:32], "data")}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [{"params": arrays}], {})
        checkpointer.wait()
        for other in (None, (), ("data", "tensor"), (None, "data")):
            wanted = shapes(arrays)
            if other is not None:
                wanted["even"] = jax.ShapeDtypeStruct(
                    (32, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*other))
                )
            [tree] = checkpointer.restore(1, [{"params": wanted}])
            assert_same(tree["params"], arrays)
            assert tree["params"]["even"].sharding == wanted["even"].sharding
    assert len(list((tmp_path / "1" / "stage_0" / "params.odd").iterdir())) == 1 + 2 * 3
    assert len(list((tmp_path / "1" / "stage_0" / "params.even").iterdir())) == 1 + 2 * 2
    named = {f"params.{name}": array for name, array in arrays.items()}
    assert_same(restore_item(tmp_path / "1" / "stage_0", shapes(named)), named)


@pytest.mark.parametrize("with_chunks", [True, False])
def test_what_earlier_versions_saved_is_restored(tmp_path, with_chunks):
    save(tmp_path / "3", trees(), {"seed": 5}, with_chunks=with_chunks)
    assert verify_checkpoint(tmp_path, 3) == []
    assert describe_checkpoint(tmp_path, 3).metadata == {"seed": 5}
    assert_same(Checkpointer(tmp_path).restore(3, shapes(trees())), trees())
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, trees(1.0), {"seed": 5})
    assert checkpointer.steps() == [3, 4]
