"""How long a compiled program takes on a described machine."""

from collections.abc import Mapping, Sequence

from meshpipe.compiled.collectives import Collective
from meshpipe.compiled.program import CompiledProgram
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.links import Group, collective_seconds

_LIKE = {"collective-broadcast": "all-gather"}
"""Kinds of collectives that take as long as another."""


def plan_seconds(program: CompiledProgram, hardware: Hardware, mesh: Mapping[str, int]) -> float:
    """The seconds of one call: its products or its memory traffic, whichever takes longer, and its collectives.

    An estimate, by the shares of the peak rates that `hardware.efficiency` has; collectives count as not overlapped.
    `mesh` has the sizes of the submesh's axes, from the outermost.
    """
    products = sum(amount / hardware.rate(dtype) for dtype, amount in program.products.items())
    products /= hardware.efficiency["products"]
    memory = program.bytes_accessed / (hardware.memory_bandwidth * hardware.efficiency["memory"])
    return max(products, memory) + sum(_seconds(collective, hardware, mesh) for collective in program.collectives)


def _seconds(collective: Collective, hardware: Hardware, mesh: Mapping[str, int]) -> float:
    """The seconds of collectives of one kind over the same axes, one after the other."""
    each = collective.bytes / collective.count if collective.count else 0.0
    kind = _LIKE.get(collective.kind, collective.kind)
    return collective.count * collective_seconds(kind, each, group_of(collective.axes, mesh), hardware)


def group_of(axes: Sequence[str], mesh: Mapping[str, int]) -> Group:
    """The devices over which a collective goes; over all of the submesh where its axes are not known."""
    size = stride = 1
    inner = 1
    for name, count in reversed(list(mesh.items())):
        if (not axes or name in axes) and count > 1:
            stride = inner if size == 1 else stride
            size *= count
        inner *= count
    return Group(size, stride)
