"""Arrays that move from the devices of one process of a run to those of another."""

import atexit
import contextlib
import itertools
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import jax
import numpy as np

from meshpipe.pipeline.connections import Connection, Listener, Message, receive_message
from meshpipe.pipeline.future_arrays import FutureArrays
from meshpipe.processes.addresses import own_address
from meshpipe.processes.coordination import coordinator_address
from meshpipe.processes.printable import printable
from meshpipe.processes.secret import current
from meshpipe.sharding import Shapes

SENDERS = 8
"""Threads that send, so that arrays which are there need not wait for as many that are not."""
DRAIN_SECONDS = 30.0
"""For what is still to be sent when Python ends."""


@dataclass(frozen=True)
class _Expected:
    """Arrays that were promised."""

    process: int
    future: int
    shapes: Shapes


class Peers:
    """Sockets of one process for arrays. Only the two processes of a transfer take part in it, in no global order.

    `address` is the one of this machine at which the others reach it; ports are chosen by the system. `accelerators`
    has those use the sockets too, through the memory of their hosts.
    """

    def __init__(self, address: str, accelerators: bool = False):
        self.accelerators = accelerators
        self._futures = FutureArrays()
        self._secret = current().derive("transfers")
        self._lock = threading.Lock()
        self._expected: dict[int, _Expected] = {}
        self._early: dict[int, Message] = {}
        """What has come before it was asked for."""
        self._gone: set[int] = set()
        self._connections: dict[int, Connection] = {}
        self._idle = threading.Condition()
        self._unsent = 0
        self._work: SimpleQueue[tuple[Connection, int, Sequence[jax.Array]]] = SimpleQueue()
        for _ in range(SENDERS):
            threading.Thread(target=self._send_all, name="sender", daemon=True).start()
        atexit.register(self._drain)
        Listener(address, self._read)

    def connect(self, process: int) -> None:
        """Opens the connection to a process before something is sent there."""
        if process not in self._connections:
            self._connections[process] = Connection(process)

    def number_of(self, name: str, receiver: int, count: int) -> int:
        """That of the `count`-th transfer of a name to a process: the same in both, and not to be guessed."""
        return self._secret.number(name, receiver, count)

    def send(self, process: int, number: int, arrays: Sequence[jax.Array]) -> None:
        """Sends arrays, which must not be donated afterwards, once they are there; returns at once.

        `number` is one that this process uses once.
        """
        with self._idle:
            self._unsent += 1
        self._work.put((self._connections[process], number, arrays))

    def receive(self, process: int, number: int, shapes: Shapes) -> list[jax.Array]:
        """What the process sends under that number; the arrays are there once it has.

        Waiting for them raises JAX's own error when the process could not make them, or is gone.
        """
        with self._lock:
            early = self._early.pop(number, None)
            if early is None and process in self._gone:
                early = _gone(process)
            if early is None:
                future, arrays = self._futures.make(shapes)
                self._expected[number] = _Expected(process, future, shapes)
                return arrays
        if not isinstance(early, str):
            return _on_devices(early, shapes)
        future, arrays = self._futures.make(shapes)
        self._futures.fail(future, shapes, early)
        return arrays

    def _send_all(self) -> None:
        while True:
            connection, number, arrays = self._work.get()
            with contextlib.suppress(OSError):  # the other end is gone, which its reader here notices
                _send(connection, number, arrays)
            del arrays
            with self._idle:
                self._unsent -= 1
                self._idle.notify_all()

    def _drain(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._unsent == 0, DRAIN_SECONDS)

    def _read(self, process: int, connection: socket.socket) -> None:
        """Takes what a process sends, until it is gone."""
        with contextlib.suppress(OSError):
            while True:
                number, message = receive_message(connection)
                with self._lock:
                    expected = self._expected.pop(number, None)
                    if expected is None:
                        self._early[number] = message
                if expected is not None:
                    self._keep(expected, message)
                    del expected, message
        with self._lock:
            self._gone.add(process)
            lost = {number: expected for number, expected in self._expected.items() if expected.process == process}
            for number in lost:
                del self._expected[number]
        for expected in lost.values():
            self._keep(expected, _gone(process))

    def _keep(self, expected: _Expected, message: Message) -> None:
        if not isinstance(message, str):
            try:
                self._futures.fill(expected.future, _on_devices(message, expected.shapes))
                return
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
        self._futures.fail(expected.future, expected.shapes, printable(message))


def _send(connection: Connection, number: int, arrays: Sequence[jax.Array]) -> None:
    try:
        parts = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    except Exception as error:  # of the program that should have made them
        connection.send(number, f"{type(error).__name__}: {error}")
    else:
        connection.send(number, parts)


def _on_devices(data: np.ndarray, shapes: Shapes) -> list[jax.Array]:
    """The bytes of arrays, one after the other, as arrays."""
    sizes = [shape.size * shape.dtype.itemsize for shape in shapes]
    if data.nbytes != sum(sizes):
        raise ValueError(f"{sum(sizes)} bytes were expected, and {data.nbytes} came")
    ends = list(itertools.accumulate(sizes))
    arrays = [
        data[end - size : end].view(shape.dtype).reshape(shape.shape)
        for shape, size, end in zip(shapes, sizes, ends, strict=True)
    ]
    return jax.device_put(arrays, [shape.sharding for shape in shapes])


def _gone(process: int) -> str:
    return f"Connection to process {process} is gone"


def open_peers(address: str, accelerators: bool = False) -> None:
    """Opens the sockets of this process, once; see `Peers`."""
    _peers.append(Peers(address, accelerators))


def by_sockets() -> bool:
    """Whether arrays on the devices of this process move to others by sockets, and not by what its backend has."""
    return jax.default_backend() == "cpu" or (bool(_peers) and _peers[0].accelerators)


def peers() -> Peers:
    """Those of this process, at the address that leads to the coordinator if they were not opened before."""
    if not _peers:
        open_peers(own_address(coordinator_address()))
    return _peers[0]


_peers: list[Peers] = []
