"""Mutual authentication of two processes on a new connection: each proves that it has the run's secret."""

import hmac
import os
import socket
import struct
import time

from meshpipe.processes.secret import IntrusionError, Secret

SECONDS = 10.0
"""Time-out of the whole handshake."""
_NONCE = 32
_HELLO = struct.Struct(f"!I{_NONCE}s32s")
"""Process number of the caller, its nonce, and its proof."""


def accept(connection: socket.socket, secret: Secret, process: int, seconds: float = SECONDS) -> int:
    """Authenticates a connection to this `process`, and returns the number of the calling process.

    Each proof answers a fresh nonce of the other side, so an overheard handshake cannot be replayed. Raises
    `IntrusionError` for a caller without the secret, or one that does not answer within `seconds`. Sends and reads
    nothing beyond the handshake.
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
        raise IntrusionError(f"it closed the connection ({_reason(error)})") from error
    return caller


def call(connection: socket.socket, secret: Secret, process: int, other: int, seconds: float = SECONDS) -> None:
    """The calling side of `accept`: this `process` has connected to the process `other`.

    Raises `IntrusionError` when the listener does not have the secret, and `OSError` when there is no answer.
    """
    deadline = time.monotonic() + seconds
    connection.settimeout(seconds)
    its_nonce = _receive(connection, _NONCE, deadline)
    nonce = os.urandom(_NONCE)
    parts = (its_nonce.hex(), nonce.hex(), process, other)
    connection.sendall(_HELLO.pack(process, nonce, secret.mac("call", *parts)))
    if not hmac.compare_digest(_receive(connection, 32, deadline), secret.mac("accept", *parts)):
        raise IntrusionError(f"the program that listens in place of process {other} does not have the run's secret")
    connection.settimeout(None)


def _receive(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Reads exactly `size` bytes before the deadline."""
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
