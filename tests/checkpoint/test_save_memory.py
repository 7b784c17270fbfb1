"""How much memory a save and a restore take, beside the arrays themselves."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from saved_trees import assert_same, on

from meshpipe.checkpoint import Checkpointer, index
from meshpipe.checkpoint.arrays import READERS
from meshpipe.mesh import make_mesh, submeshes

MIB = 1 << 20
SIZE = 96 * MIB
SLACK = 32 * MIB
"""Python's own, and what the allocator holds back."""


def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


def peak_of(action):
    """By how many bytes an action made the process grow at most, and what it returns."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
    except OSError:
        pytest.skip("the peak of a process's memory can only be told on Linux")
    before = status("VmRSS")
    found = action()
    return status("VmHWM") - before, found


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "LARGEST_CHUNK", MIB)
    (mesh,) = submeshes(make_mesh(data=2, tensor=2))
    values = np.arange(SIZE // 4, dtype=np.float32).reshape(-1, 1024)
    array = on(mesh, values, "data")
    # Placing it must not count as growth of what is measured.
    jax.block_until_ready(array)
    gc.collect()
    return mesh, array


def test_a_save_copies_no_array_of_a_cpu_device(tmp_path, large):
    _, array = large
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [{"params": {"x": jnp.ones(3)}}], {})
        checkpointer.wait()

        def save():
            checkpointer.save(2, [{"params": {"x": array}}], {})
            checkpointer.wait()

        grown, _ = peak_of(save)
    assert grown < SLACK


@pytest.mark.parametrize("spec", [("data",), (None, "data"), (("tensor", "data"),)], ids=str)
def test_a_restore_takes_the_arrays_and_a_few_files(tmp_path, large, spec):
    """Also onto another sharding, where no file is what a device needs."""
    mesh, array = large
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [{"params": {"x": array}}], {})
    wanted = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    grown, [tree] = peak_of(lambda: checkpointer.restore(1, [{"params": {"x": wanted}}]))
    assert_same(tree["params"]["x"], array)
    assert tree["params"]["x"].sharding == wanted.sharding
    assert grown < SIZE + READERS * MIB + SLACK
