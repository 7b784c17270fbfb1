"""Sends arrays from the devices of one process of a run to those of another, over sockets."""

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
from meshpipe.processes.printable import printable
from meshpipe.processes.secret import current
from meshpipe.sharding import Shapes

SENDERS = 8
"""Sender threads, so that arrays that are ready do not wait behind arrays that are not."""
DRAIN_SECONDS = 30.0
"""How long Python's exit waits for pending sends."""


@dataclass(frozen=True)
class _Expected:
    """Arrays that are yet to be received."""

    process: int
    future: int
    shapes: Shapes


class Peers:
    """The sockets of one process for arrays. Each transfer involves only its two processes; there is no global order.

    The others reach this process at `address`; the system chooses the port. Arrays on accelerators go through host
    memory.
    """

    def __init__(self, address: str):
        self._futures = FutureArrays()
        self._secret = current().derive("transfers")
        self._lock = threading.Lock()
        self._expected: dict[tuple[int, int], _Expected] = {}
        """By sender and number: two processes may each send a part of one transfer, under the same number."""
        self._early: dict[tuple[int, int], Message] = {}
        """Messages that arrived before `receive` was called for them."""
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
        """Opens the connection to a process; call it before `send`."""
        if process not in self._connections:
            self._connections[process] = Connection(process)

    def number_of(self, name: str, receiver: int, count: int) -> int:
        """The number of the `count`-th transfer of a name to a process: the same in both, and unguessable."""
        return self._secret.number(name, receiver, count)

    def send(self, process: int, number: int, arrays: Sequence[jax.Array]) -> None:
        """Sends arrays as soon as they are ready; returns at once. They must not be donated afterwards.

        This process may use each `number` only once.
        """
        with self._idle:
            self._unsent += 1
        self._work.put((self._connections[process], number, arrays))

    def receive(self, process: int, number: int, shapes: Shapes) -> list[jax.Array]:
        """Receives the arrays that a process sends under a number. Returns at once; they become ready on arrival.

        Waiting for them raises JAX's own error if the process could not compute them, or is gone.
        """
        with self._lock:
            early = self._early.pop((process, number), None)
            if early is None and process in self._gone:
                early = _gone(process)
            if early is None:
                future, arrays = self._futures.make(shapes)
                self._expected[process, number] = _Expected(process, future, shapes)
                return arrays
        if not isinstance(early, str):
            return _on_devices(early, shapes)
        future, arrays = self._futures.make(shapes)
        self._futures.fail(future, shapes, early)
        return arrays

    def _send_all(self) -> None:
        while True:
            connection, number, arrays = self._work.get()
            with contextlib.suppress(OSError):  # the peer is gone, which the thread that reads from it notices
                _send(connection, number, arrays)
            del arrays
            with self._idle:
                self._unsent -= 1
                self._idle.notify_all()

    def _drain(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._unsent == 0, DRAIN_SECONDS)

    def _read(self, process: int, connection: socket.socket) -> None:
        """Receives all messages of a process until it is gone."""
        with contextlib.suppress(OSError):
            while True:
                number, message = receive_message(connection)
                with self._lock:
                    expected = self._expected.pop((process, number), None)
                    if expected is None:
                        self._early[process, number] = message
                if expected is not None:
                    self._keep(expected, message)
                    del expected, message
        with self._lock:
            self._gone.add(process)
            lost = {key: expected for key, expected in self._expected.items() if expected.process == process}
            for key in lost:
                del self._expected[key]
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
    except Exception as error:  # raised by the program that computes them
        connection.send(number, f"{type(error).__name__}: {error}")
    else:
        connection.send(number, parts)


def _on_devices(data: np.ndarray, shapes: Shapes) -> list[jax.Array]:
    """Arrays on devices from their concatenated bytes."""
    sizes = [shape.size * shape.dtype.itemsize for shape in shapes]
    if data.nbytes != sum(sizes):
        raise ValueError(f"expected {sum(sizes)} bytes, received {data.nbytes}")
    ends = list(itertools.accumulate(sizes))
    arrays = [
        data[end - size : end].view(shape.dtype).reshape(shape.shape)
        for shape, size, end in zip(shapes, sizes, ends, strict=True)
    ]
    return jax.device_put(arrays, [shape.sharding for shape in shapes])


def _gone(process: int) -> str:
    return f"Connection to process {process} is gone"
