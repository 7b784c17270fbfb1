"""Trees of stages to save, and what to compare them with."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

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
