"""How arrays move between the processes of a run, and what carries them."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import jax

from meshpipe.pipeline.peers import Peers
from meshpipe.pipeline.pulls import Pulls
from meshpipe.processes.addresses import own_address
from meshpipe.processes.coordination import coordinator_address, process_count
from meshpipe.processes.join import transfers_asked
from meshpipe.sharding import Shapes

Way = Literal["native", "sockets", "server"]
"""By the backend's own transport, through `jax.device_put`; over sockets of this package; by JAX's transfer server."""


@runtime_checkable
class Carrier(Protocol):
    """Carries arrays between any two processes, in any order; see `Peers`."""

    def connect(self, process: int) -> None: ...
    def number_of(self, name: str, receiver: int, count: int) -> int: ...
    def send(self, process: int, number: int, arrays: Sequence[jax.Array]) -> None: ...
    def receive(self, process: int, number: int, shapes: Shapes) -> list[jax.Array]: ...


def way_between_processes() -> Way:
    """How arrays move between the processes of this run."""
    asked, platform = transfers_asked(), jax.default_backend()
    if asked != "auto":
        return asked
    if platform == "cpu":
        return "sockets"
    # On TPUs, the two sides of a transfer by `jax.device_put` meet by its number, and each process counts those that it
    # has called. So all processes would have to call all transfers of a run, in one order.
    return "server" if platform == "tpu" and process_count() > 2 else "native"


def open_carrier() -> None:
    """Opens what carries arrays, where the backend's own transport does not, so that other processes find it early."""
    if way_between_processes() != "native":
        carrier()


def carrier() -> Carrier:
    """What carries the arrays of this process, on the interface towards the coordinator; opened at the first call."""
    way: Way = "server" if way_between_processes() == "server" else "sockets"
    if way not in _carriers:
        _carriers[way] = (Pulls if way == "server" else Peers)(own_address(coordinator_address()))
    return _carriers[way]


_carriers: dict[Way, Carrier] = {}
