"""The digest of a base: another for any other bit, path, shape or dtype, and the same on every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe import make_mesh, submeshes
from meshpipe.processes.group import Group
from meshpipe.training.base import digest_of_leaves

ALONE = Group([0])
VALUES = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)


def digest(**leaves):
    return digest_of_leaves({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, ALONE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "bool", "complex64", "uint32"])
def test_layouts_and_order_do_not_matter(dtype):
    whole = jnp.asarray(VALUES).astype(dtype)
    mesh = submeshes(make_mesh(data=2, tensor=2))[0]
    expected = digest(a=whole, b=whole[0])
    for spec in (
        PartitionSpec("data", "tensor"),
        PartitionSpec("tensor"),
        PartitionSpec(None, "data"),
        PartitionSpec(),
    ):
        placed = jax.device_put(whole, NamedSharding(mesh, spec))
        assert digest_of_leaves({"b": whole[0], "a": placed}, ALONE) == expected


def test_every_difference_matters():
    one_bit = VALUES.copy()
    one_bit.view(np.uint32)[3, 4] ^= 1
    swapped = VALUES.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    negative_zero, zero = np.full(4, -0.0, np.float32), np.zeros(4, np.float32)
    found = [
        digest(a=VALUES),
        digest(b=VALUES),
        digest(a=one_bit),
        digest(a=swapped),
        digest(a=VALUES.T),
        digest(a=VALUES.reshape(6, 8)),
        digest(a=VALUES.view(np.int32)),
        digest(a=zero),
        digest(a=negative_zero),
        digest(a=zero[:3]),
        digest(a=zero, b=zero),
    ]
    assert len(set(found)) == len(found)
    assert digest(a=VALUES) == digest(a=VALUES.copy())
    assert len(found[0]) == 32
