"""How long collectives and transfers take on the links of a described machine."""

import math
from dataclasses import dataclass

from meshpipe.hardware.hardware import Hardware

ROUNDS = {
    "all-reduce": 2.0,
    "all-gather": 1.0,
    "reduce-scatter": 1.0,
    "all-to-all": 1.0,
}
"""How often a ring moves the whole array, by the kind of collective: all-reduce is two others, one after the other."""


@dataclass(frozen=True)
class Group:
    """The devices that take part in a collective, as places in the order of the mesh."""

    size: int
    stride: int = 1
    """The distance from one to the next: 1 for the innermost axis."""

    def joined(self, hardware: Hardware) -> int:
        """How many of them fast links join, if those join consecutive devices."""
        return max(1, min(self.size, hardware.joined_devices // self.stride))

    def islands(self, hardware: Hardware) -> int:
        """How many sets of joined devices they are in."""
        return -(-self.size // self.joined(hardware))


def bandwidth(group: Group, hardware: Hardware) -> float:
    """Bytes per second that each device of the group sends to the next.

    Where fast links do not join all of it, those that they join send to the next at once, each over its own link.
    """
    inside = hardware.axis_link * hardware.efficiency["links"]
    if group.islands(hardware) == 1:
        return inside
    beyond = hardware.network_link * hardware.efficiency["network"] * group.joined(hardware)
    return min(inside, beyond) if group.joined(hardware) > 1 else beyond


def latency(group: Group, hardware: Hardware) -> float:
    """Seconds until the last device has the first byte, in a tree."""
    inside, islands = group.joined(hardware), group.islands(hardware)
    hops = math.ceil(math.log2(inside)), math.ceil(math.log2(islands))
    return hops[0] * hardware.host_latency + hops[1] * hardware.network_latency


def collective_seconds(kind: str, nbytes: float, group: Group, hardware: Hardware, count: int = 1) -> float:
    """The seconds of a collective, by a ring; or of several, one after the other.

    Arguments:
        kind: As HLO names it: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all` or `collective-permute`.
        nbytes: The bytes of the whole array on one device: what goes into a reduction, or comes out of a gather.
        group: The devices that take part.
        hardware: The machine.
        count: Of how many collectives `nbytes` is the sum.
    """
    if group.size == 1 or nbytes == 0:
        return 0.0
    if kind == "collective-permute":
        return move_seconds(nbytes, group.stride, hardware)
    sent = (group.size - 1) / group.size * nbytes
    return ROUNDS[kind] * (sent / bandwidth(group, hardware) + count * latency(group, hardware))


def move_seconds(nbytes: float, distance: int, hardware: Hardware) -> float:
    """The seconds in which every device sends so many bytes to the one that is `distance` places further."""
    if nbytes == 0:
        return 0.0
    if distance < hardware.joined_devices:
        return nbytes / (hardware.neighbour_link * hardware.efficiency["links"]) + hardware.host_latency
    return nbytes / (hardware.network_link * hardware.efficiency["network"]) + hardware.network_latency
