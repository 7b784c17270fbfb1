"""Arrays keep their values when they move between submeshes, and the originals stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe.mesh import make_mesh, submeshes
from meshpipe.pipeline.transfer import check_native, transfer_to
from meshpipe.sharding import activation_sharding, replicated

FIRST, SECOND = submeshes(make_mesh(2, 2, 2))


def on(mesh: jax.sharding.Mesh, value: np.ndarray, *spec: str | None) -> jax.Array:
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))


def test_arrays_arrive_with_their_values_and_the_wanted_shardings() -> None:
    matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
    values = (matrix, np.arange(4, dtype=np.int32), np.asarray(2.5, jnp.bfloat16))
    arrays = (on(FIRST, values[0], "data", "tensor"), on(FIRST, values[1], "data"), on(FIRST, values[2]))
    wanted = (*(activation_sharding(SECOND, v.shape, 4) for v in values[:2]), replicated(SECOND))
    moved = transfer_to(wanted)(arrays)
    for value, array, sharding in zip(values, moved, wanted, strict=True):
        assert array.sharding == sharding
        assert array.dtype == value.dtype
        np.testing.assert_array_equal(np.asarray(array), value)
    for value, array in zip(values, arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(array), value)


def test_a_submesh_of_another_size_can_receive() -> None:
    (single,) = submeshes(make_mesh(1, devices=jax.devices()[7:]))
    (moved,) = transfer_to((replicated(single),))((on(FIRST, np.arange(8.0), "data"),))
    assert moved.devices() == {jax.devices()[7]}
    np.testing.assert_array_equal(np.asarray(moved), np.arange(8.0))


def test_a_boundary_without_arrays_is_fine() -> None:
    assert transfer_to(())(()) == ()


def test_moves_that_accelerators_cannot_make_are_refused_before_the_first_step() -> None:
    check_native([(0, 1), (2, 3)])
    check_native([(0, 1), (1, 1)])
    with pytest.raises(ValueError, match=r"must be of one process.*\[0, 1\].*--transfers sockets"):
        check_native([(0, 1), (1, 0)])
