"""Arrays that are returned before their values are known; another thread fills them in later."""

import itertools
import os
import secrets
import socket
import stat
from collections.abc import Iterator, Sequence

import jax
from jax.extend.backend import get_backend

from meshpipe.sharding import Shapes


class FutureArrays:
    """Creates such arrays for the devices of this process.

    The only public way to make them is the server of `jax.experimental.transfer`, here connected to itself. The server
    does not authenticate connections, and four bytes from any client abort the process. So it listens only on the
    loopback address, and only for the milliseconds until its own connection exists. Then its port is closed, and all
    other connections are shut down.
    """

    def __init__(self) -> None:
        from jax.experimental import transfer  # imported late: a run of one process needs no experimental JAX API

        self._make_error = transfer.make_error_array
        self._server = transfer.start_transfer_server(get_backend(), "127.0.0.1:0", [])
        self._connection = self._server.connect(self._server.address())
        self._numbers = itertools.count(secrets.randbits(63))
        self._nobody = socket.socketpair()
        self._check()
        self._close_port(int(self._server.address().rpartition(":")[2]))

    def make(self, shapes: Shapes) -> tuple[int, list[jax.Array]]:
        """Creates arrays of these shapes and shardings, and the number by which to fill them, once."""
        number = next(self._numbers)
        return number, self._connection.pull(number, list(shapes))

    def fill(self, number: int, arrays: Sequence[jax.Array]) -> None:
        """Sets the values of the arrays with this number."""
        self._server.await_pull(number, list(arrays))

    def fail(self, number: int, shapes: Shapes, message: str) -> None:
        """Fails the arrays with this number: waiting for them raises an error with this message."""
        self.fill(number, [self._make_error(shape, message) for shape in shapes])

    def _check(self) -> None:
        """Sends one array through the connection, and waits for it."""
        device = jax.local_devices()[0]
        ready = jax.device_put(0, device)
        number, arrays = self.make((jax.ShapeDtypeStruct(ready.shape, ready.dtype, sharding=ready.sharding),))
        self.fill(number, [ready])
        jax.block_until_ready(arrays)

    def _close_port(self, port: int) -> None:
        # Replace the server's listening socket by one that cannot be reached.
        own = []
        for descriptor, found in _sockets():
            if found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                if found.getsockname()[1] == port:
                    os.dup2(self._nobody[0].fileno(), descriptor, inheritable=False)
            elif _port(found.getpeername()) == port:
                own.append(found.getsockname())
        self._check()  # makes the server poll its sockets again
        for _, found in _sockets():
            is_accepted = _port(found.getsockname()) == port and found.getpeername() not in own
            if is_accepted:
                found.shutdown(socket.SHUT_RDWR)


def _sockets() -> Iterator[tuple[int, socket.socket]]:
    """The TCP sockets of this process with their descriptors. Each socket object is a copy, closed after its turn."""
    for name in os.listdir("/dev/fd"):
        try:
            descriptor = int(name)
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            copy = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed in the meantime
            continue
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                try:
                    yield descriptor, copy
                except OSError:  # not connected
                    continue


def _port(address: tuple[str, int]) -> int:
    return address[1]
