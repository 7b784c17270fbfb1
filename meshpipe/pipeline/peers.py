"""Connections between the processes of a run, for arrays that move from the devices of one to those of another."""

import hashlib
from collections.abc import Sequence

import jax
from jax.extend.backend import get_backend

from meshpipe.processes.coordination import ask, process_index, tell

CONNECT_SECONDS = 300.0
"""How long a process may wait for another to open its socket."""

Shapes = Sequence[jax.ShapeDtypeStruct]


class Peers:
    """Sockets of one process for arrays. Only the two processes of a transfer take part in it, in no global order.

    `address` is the one of this machine at which the others reach it; ports are chosen by the system. `accelerators`
    has those use the sockets too, through the memory of their hosts.
    """

    def __init__(self, address: str, accelerators: bool = False):
        from jax.experimental import transfer  # late: one process does not depend on what is experimental in JAX

        self.accelerators = accelerators
        host = f"[{address}]" if ":" in address else address
        self._server = transfer.start_transfer_server(get_backend(), f"{host}:0", [f"{host}:0"] * 2)
        self._connections: dict[int, transfer.TransferConnection] = {}
        self._names: dict[int, str] = {}
        tell(f"meshpipe/transfer/{process_index()}", self._server.address())

    def connect(self, process: int) -> None:
        """Opens the connection to a process before it is needed."""
        if process not in self._connections:
            address = ask(f"meshpipe/transfer/{process}", CONNECT_SECONDS)
            self._connections[process] = self._server.connect(address)

    def number_of(self, name: str) -> int:
        """A number below 2^32 for a name, the same in all processes and no other name's of this one."""
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        assert self._names.setdefault(number, name) == name, f"{name} and {self._names[number]} share a number"
        return number

    def send(self, number: int, arrays: Sequence[jax.Array]) -> None:
        """Lets another process have arrays, which must not be donated afterwards; returns at once.

        `number` is one that this process uses once.
        """
        self._server.await_pull(number, list(arrays))

    def receive(self, process: int, number: int, shapes: Shapes) -> list[jax.Array]:
        """What the process sends under that number; the arrays are there once it has."""
        self.connect(process)
        return self._connections[process].pull(number, list(shapes))


def open_peers(address: str, accelerators: bool = False) -> None:
    """Opens the sockets of this process, once; see `Peers`."""
    _peers.append(Peers(address, accelerators))


def by_sockets() -> bool:
    """Whether arrays on the devices of this process move to others by sockets, and not by what its backend has."""
    return jax.default_backend() == "cpu" or (bool(_peers) and _peers[0].accelerators)


def peers() -> Peers:
    """Those of this process, at the loopback address if they were not opened before."""
    if not _peers:
        open_peers("127.0.0.1")
    return _peers[0]


_peers: list[Peers] = []
