"""Moves arrays between processes by JAX's transfer server: the sender offers them, and the receiver pulls them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax

from meshpipe.processes.coordination import barrier, process_index, set_key, wait_for_key
from meshpipe.processes.guard import before_leaving
from meshpipe.processes.secret import current
from meshpipe.sharding import Shapes

if TYPE_CHECKING:
    from jax.experimental.transfer import TransferConnection

START_SECONDS = 300.0
"""How long a process waits for another to start its server."""
LEAVE_SECONDS = 30.0
"""How long a process that has completed waits for the others, which may still pull from it."""
STREAMS = 4
"""Sockets that the parts of a large array share."""


class Pulls:
    """The transfer server of one process. Each transfer involves only its two processes; there is no global order.

    It serves every backend: on TPUs and GPUs, arrays go through host memory and the network, without the devices
    waiting. The others reach this process at `address`; the system chooses the ports.
    """

    def __init__(self, address: str) -> None:
        from jax.experimental import transfer

        place = f"[{address}]:0" if ":" in address else f"{address}:0"
        client = jax.local_devices()[0].client
        self._server = transfer.start_transfer_server(client, place, [place] * STREAMS)
        self._connections: dict[int, TransferConnection] = {}
        self._secret = current().derive("transfers")
        set_key(_key(process_index()), self._server.address())
        before_leaving(lambda: barrier("meshpipe/pulled", LEAVE_SECONDS))

    def connect(self, process: int) -> None:
        """Does nothing: the receiver connects to the sender."""

    def number_of(self, name: str, receiver: int, count: int) -> int:
        """The number of the `count`-th transfer of a name to a process: the same in both, and unguessable."""
        return self._secret.number(name, receiver, count)

    def send(self, process: int, number: int, arrays: Sequence[jax.Array]) -> None:
        """Offers arrays, which are kept until they are pulled; returns at once. They must not be donated afterwards."""
        self._server.await_pull(number, list(arrays))

    def receive(self, process: int, number: int, shapes: Shapes) -> list[jax.Array]:
        """Pulls the arrays that a process offers, or will offer, under a number. They become ready on arrival."""
        connection = self._connections.get(process)
        if connection is None:
            connection = self._server.connect(wait_for_key(_key(process), START_SECONDS))
            self._connections[process] = connection
        return list(connection.pull(number, list(shapes)))


def _key(process: int) -> str:
    return f"meshpipe/pull/{process}"
