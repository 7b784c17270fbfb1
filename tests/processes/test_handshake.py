"""Callers without the secret get no connection, whatever they send or replay; callers with it do."""

import contextlib
import socket
import threading
from collections.abc import Callable

import pytest
from waiting import LONG

from meshpipe.processes.handshake import accept, call
from meshpipe.processes.secret import IntrusionError, Secret

SECRET, OTHER = Secret(b"that of this run"), Secret(b"that of another")


def accepted(visit: Callable[[socket.socket], object], seconds: float = LONG) -> int:
    """The result of `accept` in process 0 for a visitor."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        thread = threading.Thread(target=visit, args=(theirs,))
        thread.start()
        try:
            return accept(ours, SECRET, 0, seconds)
        finally:
            ours.close()
            thread.join()


def call_with(secret: Secret, process: int = 3, other: int = 0) -> Callable[[socket.socket], None]:
    def visit(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            call(connection, secret, process, other, LONG)

    return visit


def test_both_sides_authenticate() -> None:
    assert accepted(lambda connection: call(connection, SECRET, 3, 0)) == 3


@pytest.mark.parametrize(
    ("visit", "reason"),
    [
        pytest.param(call_with(OTHER), "does not have the run's secret", id="another secret"),
        pytest.param(call_with(Secret(b"")), "does not have the run's secret", id="no secret"),
        pytest.param(call_with(SECRET, other=1), "does not have the run's secret", id="meant for another process"),
        pytest.param(lambda connection: connection.sendall(bytes(68)), "does not have", id="zeros"),
        pytest.param(lambda connection: connection.sendall(b"GET / HTTP/1.1\r\n" * 99), "does not have", id="garbage"),
        pytest.param(lambda connection: connection.sendall(bytes(4)), r"did not prove .*timed out", id="four zeros"),
        pytest.param(lambda connection: connection.close(), "did not prove", id="closed"),
        pytest.param(lambda connection: None, r"did not prove .*timed out", id="silent"),
    ],
)
def test_a_caller_without_the_secret_is_refused(visit: Callable[[socket.socket], object], reason: str) -> None:
    with pytest.raises(IntrusionError, match=reason):
        accepted(visit, seconds=0.5 if "timed out" in reason else LONG)


def test_sending_slowly_does_not_extend_the_deadline() -> None:
    def drip(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for _ in range(60):
                connection.sendall(b"x")
                stop.wait(0.1)

    stop = threading.Event()
    with pytest.raises(IntrusionError, match="timed out"):
        accepted(drip, seconds=0.5)


def test_an_overheard_handshake_cannot_be_replayed() -> None:
    overheard: list[bytes] = []

    class Ear(socket.socket):
        """A connection that keeps what its user sends."""

        def sendall(self, data: bytes, flags: int = 0) -> None:  # type: ignore[override]
            overheard.append(data)
            super().sendall(data, flags)

    def visit(connection: socket.socket) -> None:
        with Ear(fileno=connection.detach()) as ear:
            call(ear, SECRET, 3, 0)

    assert accepted(visit) == 3
    with pytest.raises(IntrusionError, match="does not have the run's secret"):
        accepted(lambda connection: connection.sendall(b"".join(overheard)))


def test_a_caller_notices_an_impostor() -> None:
    for answer in (bytes(32) * 2, OTHER.mac("x") * 2):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(answer)
            with pytest.raises(IntrusionError, match="in place of process 1 does not have the run's secret"):
                call(ours, SECRET, 0, 1)
