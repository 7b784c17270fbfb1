"""Authenticated one-way connections between the processes of a run."""

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from meshpipe.processes.coordination import process_index, set_key, wait_for_key
from meshpipe.processes.handshake import accept, call
from meshpipe.processes.secret import IntrusionError, Secret, current

CONNECT_SECONDS = 300.0
"""How long a process waits for another to open its socket."""
RETRY_SECONDS = 0.2
MAX_HANDSHAKES = 64
"""Handshakes in progress at a time. Further connections are closed; a process of the run retries."""
MAX_COMPLAINTS = 10
SMALL = 1 << 16
"""Messages up to this many bytes are sent together with their header."""
MAX_ERROR = 1 << 14
_HEADER = struct.Struct("!Q?Q")
"""Message number, whether it is an error, and its length in bytes."""

Message = np.ndarray | str
"""The bytes of arrays, or an error message in their place."""
Reader = Callable[[int, socket.socket], None]


class Listener:
    """Accepts connections of the other processes at one address of this machine, with a thread for each.

    For each authenticated connection, it calls `serve` with the number of the process and the connection, and closes
    the connection when `serve` returns.
    """

    def __init__(self, address: str, serve: Reader) -> None:
        self._secret = _secret()
        self._serve = serve
        self._complaints = 0
        self._handshakes = threading.BoundedSemaphore(MAX_HANDSHAKES)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.create_server((address, 0), family=family, backlog=1024)
        host, port = self._socket.getsockname()[:2]
        set_key(_key(process_index()), f"{host} {port}")
        threading.Thread(target=self._accept, name="listener", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError:  # out of file descriptors, or the caller has already closed the connection
                time.sleep(RETRY_SECONDS)
                continue
            if not self._handshakes.acquire(blocking=False):
                connection.close()
                continue
            where = f"{address[0]} port {address[1]}"
            threading.Thread(target=self._welcome, args=(connection, where), name="connection", daemon=True).start()

    def _welcome(self, connection: socket.socket, where: str) -> None:
        with connection:
            try:
                caller = accept(connection, self._secret, process_index())
            except IntrusionError as error:
                self._complain(f"refused a connection from {where}: {error}")
                return
            finally:
                self._handshakes.release()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._serve(caller, connection)

    def _complain(self, message: str) -> None:
        self._complaints += 1
        if self._complaints <= MAX_COMPLAINTS:
            more = " Further ones are not reported." if self._complaints == MAX_COMPLAINTS else ""
            print(f"meshpipe: process {process_index()} {message}.{more}", file=sys.stderr, flush=True)


class Connection:
    """A connection from this process to another; thread-safe."""

    def __init__(self, process: int) -> None:
        """Connects to the process. Raises `ConnectionError` if it does not answer, and `IntrusionError` if an impostor
        does.
        """
        host, port = wait_for_key(_key(process), CONNECT_SECONDS).split()
        self._lock = threading.Lock()
        deadline = time.monotonic() + CONNECT_SECONDS
        while True:
            connection: socket.socket | None = None
            try:
                connection = socket.create_connection((host, int(port)), CONNECT_SECONDS)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                call(connection, _secret(), process_index(), process)
            except IntrusionError:
                raise
            except OSError as error:
                with contextlib.suppress(AttributeError, OSError):
                    connection.close()  # type: ignore[union-attr]
                if time.monotonic() > deadline:
                    raise ConnectionError(f"Process {process} does not answer at {host}:{port}: {error}") from error
                time.sleep(RETRY_SECONDS)
            else:
                self._socket = connection
                return

    def send(self, number: int, message: Sequence[np.ndarray] | str) -> None:
        """Sends the bytes of arrays in order, or an error message. Raises `OSError` when the peer is gone."""
        is_error = isinstance(message, str)
        parts = [np.frombuffer(message.encode()[:MAX_ERROR], np.uint8)] if isinstance(message, str) else message
        size = sum(part.nbytes for part in parts)
        header = _HEADER.pack(number, is_error, size)
        with self._lock:
            if size <= SMALL:
                self._socket.sendall(b"".join([header, *(part.data for part in parts)]))
                return
            self._socket.sendall(header)
            for part in parts:
                self._socket.sendall(part.data)


def receive_message(connection: socket.socket) -> tuple[int, Message]:
    """Receives the next message and its number. Raises `OSError` when the peer is gone."""
    number, is_error, size = _HEADER.unpack(_receive(connection, _HEADER.size).data)
    if is_error:
        return number, _receive(connection, min(size, MAX_ERROR)).tobytes().decode(errors="replace")
    return number, _receive(connection, size)


def _receive(connection: socket.socket, size: int) -> np.ndarray:
    data = np.empty(size, np.uint8)
    left = data.data
    while left.nbytes:
        count = connection.recv_into(left)
        if not count:
            raise ConnectionResetError("closed by the other end")
        left = left[count:]
    return data


def _secret() -> Secret:
    return current().derive("connections")


def _key(process: int) -> str:
    return f"meshpipe/transfer/{process}"
