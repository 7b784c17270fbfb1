"""Arrays whose values come later, through a server that no other program can reach."""

import os
import socket
import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe.mesh import make_mesh, submeshes
from meshpipe.pipeline.future_arrays import FutureArrays, _sockets

MESH = submeshes(make_mesh(1, 2))[0]


@pytest.fixture(scope="module")
def future_arrays() -> FutureArrays:
    return FutureArrays()


def test_values_come_later_from_another_thread(future_arrays: FutureArrays) -> None:
    for spec in (PartitionSpec(), PartitionSpec("data")):
        sharding = NamedSharding(MESH, spec)
        number, (array,) = future_arrays.make((jax.ShapeDtypeStruct((4,), np.int32, sharding=sharding),))
        assert not array.is_ready()
        value = np.arange(4, dtype=np.int32)
        threading.Timer(
            0.05, lambda n, s, v: future_arrays.fill(n, [jax.device_put(v, s)]), (number, sharding, value)
        ).start()
        np.testing.assert_array_equal(np.asarray(array + 1), value + 1)
        assert array.sharding == sharding


def test_waiting_for_failed_arrays_raises_the_message(future_arrays: FutureArrays) -> None:
    shapes = (jax.ShapeDtypeStruct((4,), np.int32, sharding=NamedSharding(MESH, PartitionSpec())),) * 2
    number, arrays = future_arrays.make(shapes)
    future_arrays.fail(number, shapes, "Connection to process 1 is gone")
    for array in arrays:
        with pytest.raises(jax.errors.JaxRuntimeError, match="Connection to process 1 is gone"):
            jax.block_until_ready(array)


def test_its_port_is_closed() -> None:
    before = ports()
    own = FutureArrays()
    assert ports() == before
    port = int(own._server.address().rpartition(":")[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)
    own._check()  # it still works, without anybody's help


def test_listing_sockets_leaks_no_descriptor() -> None:
    before = os.listdir("/dev/fd")
    list(_sockets())
    assert len(os.listdir("/dev/fd")) == len(before)


def ports() -> set[int]:
    found = _sockets()
    return {s.getsockname()[1] for _, s in found if s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)}
