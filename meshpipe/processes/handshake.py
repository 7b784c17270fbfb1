"""How two processes of a run prove to each other, on a new connection, that they have its secret."""

import hmac
import os
import socket
import struct
import time

from meshpipe.processes.secret import IntrusionError, Secret

SECONDS = 10.0
"""For a whole handshake."""
_NONCE = 32
_HELLO = struct.Struct(f"!I{_NONCE}s32s")
"""Number of the caller, its nonce, and its proof."""


def accept(connection: socket.socket, secret: Secret, process: int, seconds: float = SECONDS) -> int:
    """The number of the process that has called this `process`, once both have proved that they have the secret.

    Every proof answers a fresh nonce of the other side, so nothing that was overheard can be used again. Raises
    `IntrusionError` for anybody else, also for one who says nothing within `seconds`, and sends and reads no more than
    the handshake.
    """
    deadline = time.monotonic() + seconds
    nonce = os.urandom(_NONCE)
    try:
        connection.settimeout(seconds)
        connection.sendall(nonce)
        caller, its_nonce, proof = _HELLO.unpack(_receive(connection, _HELLO.size, deadline))
    except OSError as error:
        raise IntrusionError(f"it did not prove that it has the run's secret ({_reason(error)})") from error
    parts = (nonce.hex(), its_nonce.hex(), caller, process)
    if not hmac.compare_digest(proof, secret.mac("call", *parts)):
        raise IntrusionError("it does not have the run's secret")
    try:
        connection.sendall(secret.mac("accept", *parts))
        connection.settimeout(None)
    except OSError as error:
        raise IntrusionError(f"it went away ({_reason(error)})") from error
    return caller


def call(connection: socket.socket, secret: Secret, process: int, other: int, seconds: float = SECONDS) -> None:
    """The same for the side of `process`, which has called the process `other`.

    Raises `IntrusionError` when somebody else answers, and `OSError` when nobody does.
    """
    deadline = time.monotonic() + seconds
    connection.settimeout(seconds)
    its_nonce = _receive(connection, _NONCE, deadline)
    nonce = os.urandom(_NONCE)
    parts = (its_nonce.hex(), nonce.hex(), process, other)
    connection.sendall(_HELLO.pack(process, nonce, secret.mac("call", *parts)))
    if not hmac.compare_digest(_receive(connection, 32, deadline), secret.mac("accept", *parts)):
        raise IntrusionError(f"whoever listens where process {other} should does not have the run's secret")
    connection.settimeout(None)


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Exactly so many bytes, before the deadline."""
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("closed by the other end")
        data += part
    return data


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
