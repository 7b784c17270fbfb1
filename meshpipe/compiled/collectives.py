"""The collectives of a compiled program: how many, over which mesh axes, and how many bytes."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from meshpipe.compiled.hlo import Computation, Instruction, Module

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_IOTA = re.compile(r"(?:replica_groups=)\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))?\s*\{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of a program that are of one kind and over the same mesh axes."""

    kind: str
    """Such as `all-reduce`."""
    count: int
    """How many run in one call of the program."""
    bytes: int
    """Of the whole arrays that one device has a part in, over all of them: what an all-gather or a permute results in,
    and what the other kinds take."""
    axes: tuple[str, ...]
    """The mesh axes over which devices exchange; empty where that cannot be told."""


def collectives_of(module: Module, mesh: Mapping[str, int]) -> tuple[Collective, ...]:
    """What the program of a submesh exchanges; `mesh` has the sizes of its axes."""
    found: dict[tuple[str, tuple[str, ...]], list[int]] = defaultdict(lambda: [0, 0])
    seen: set[tuple[str, str]] = set()
    for computation, instruction, times, fused in module.walk(inside_fusions=True):
        kind = instruction.op.removesuffix("-start")
        if kind not in KINDS:
            continue
        channel = _CHANNEL.search(instruction.attributes)
        if fused and channel is not None:
            # A TPU overlaps a collective with other work by writing it into several fusions.
            if (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel[1]))
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        entry = found[kind, _axes(instruction.attributes, mesh)]
        entry[0] += times
        entry[1] += times * _bytes(kind, computation, instruction)
    return tuple(
        Collective(kind=kind, count=count, bytes=total, axes=axes)
        for (kind, axes), (count, total) in sorted(found.items())
    )


def _bytes(kind: str, computation: Computation, instruction: Instruction) -> int:
    taken = sum(array.bytes for array in computation.operands(instruction))
    if kind in ("all-gather", "collective-permute"):
        made = [array.bytes for array in instruction.results]
        # What starts an asynchronous one also returns what it takes.
        return sum(made) - taken if instruction.op == "all-gather-start" else max(made, default=taken)
    return taken


def _axes(attributes: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    sizes = list(mesh.values())
    groups = _groups(attributes, math.prod(sizes))
    if groups is None:
        return ()
    names = list(mesh)
    places = [np.stack(np.unravel_index(np.asarray(group), sizes)) for group in groups]
    return tuple(name for k, name in enumerate(names) if any(len(set(place[k].tolist())) > 1 for place in places))


def _groups(attributes: str, devices: int) -> list[list[int]] | None:
    """The numbers of the devices that exchange with each other; None where that cannot be told."""
    if (iota := _IOTA.search(attributes)) is not None:
        shape, sizes = _numbers(iota[1]), _numbers(iota[2])
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
        groups = ids.reshape(-1, shape[-1]).tolist() if len(shape) > 1 else ids.reshape(1, -1).tolist()
    elif (listed := _LISTED.search(attributes)) is not None:
        groups = [_numbers(group) for group in re.findall(r"\{([\d,\s]+)\}", listed[1])]
    elif (named := _MESH.search(attributes)) is not None:
        sizes = [int(size) for size in re.findall(r"=(\d+)", named[1])]
        axes = re.findall(r"'([^']+)'", named[1])
        wanted = [axes.index(name) for name in re.findall(r"'([^']+)'", named[3]) if name in axes]
        if len(wanted) != named[3].count("'") // 2 or ":" in named[3]:
            return None
        others = [k for k in range(len(sizes)) if k not in wanted]
        ids = np.arange(math.prod(sizes))
        if named[2] is not None:
            if (order := _ORDER.fullmatch(named[2].strip())) is None:
                return None
            ids = ids.reshape(_numbers(order[1])).transpose(_numbers(order[2]) if order[2] else None)
        ids = ids.reshape(sizes).transpose([*others, *wanted])
        groups = ids.reshape(-1, math.prod(sizes[k] for k in wanted)).tolist()
    elif "replica_groups={}" in attributes:
        groups = [list(range(devices))]
    else:
        return None
    return groups if all(0 <= n < devices for group in groups for n in group) else None


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number.strip()]
