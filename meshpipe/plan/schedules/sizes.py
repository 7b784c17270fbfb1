"""What every schedule has in common: its signature, the sizes that it takes, and where stages are placed."""

from collections.abc import Mapping
from typing import Protocol

from meshpipe.plan.plan import Plan


class Schedule(Protocol):
    """A rule that makes the plan of any sizes; raises `ValueError` for sizes that do not fit it."""

    def __call__(self, num_ranks: int, num_microbatches: int, stages_per_rank: int = ..., /) -> Plan: ...


STAGES_PER_RANK: Mapping[str, tuple[int, int | None]] = {
    "gpipe": (1, None),
    "1f1b": (1, 1),
    "eager-1f1b": (1, 1),
    "interleaved-1f1b": (2, None),
    "looped-bfs": (2, None),
    "zb-h1": (1, 1),
    "zb-h2": (1, 1),
    "zb-v": (2, 2),
    "dualpipe-v": (2, 2),
    "inference": (1, None),
}
"""The fewest and the most stages per rank that a schedule takes, by its name; None is any number."""

SEVERAL_STAGES = tuple(name for name, (_, most) in STAGES_PER_RANK.items() if most != 1)
"""Names of the schedules that take more than one stage per rank."""


def takes_stages(name: str, stages_per_rank: int) -> bool:
    least, most = STAGES_PER_RANK[name]
    return least <= stages_per_rank and (most is None or stages_per_rank <= most)


def check_sizes(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    """Raises `ValueError` when the schedule with this name cannot be made for these sizes."""
    sizes = {"ranks": num_ranks, "microbatches": num_microbatches, "stages per rank": stages_per_rank}
    for what, size in sizes.items():
        if size < 1:
            raise ValueError(f"A plan needs at least 1 of its {what}. Got {size}.")
    if takes_stages(name, stages_per_rank):
        return
    least, most = STAGES_PER_RANK[name]
    number = {1: "one", 2: "two"}[least]
    others = [other for other in STAGES_PER_RANK if other != "inference" and takes_stages(other, stages_per_rank)]
    raise ValueError(
        f"The schedule {name} takes {'' if most else 'at least '}{number} stage{'s' if least > 1 else ''} per rank. "
        f"Got {stages_per_rank}. Take {number}{'' if most else ' or more'}, or a schedule that takes "
        f"{'one' if stages_per_rank == 1 else 'several'}: {', '.join(others)}."
    )


def loop(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The ranks of stages dealt in turn: stage s on rank s mod R."""
    return tuple(range(num_ranks)) * stages_per_rank


def zigzag(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The ranks of stages that go to the last rank, back to the first, and so on: with two per rank, a V."""
    down = tuple(range(num_ranks))
    return tuple(rank for turn in range(stages_per_rank) for rank in (down[::-1] if turn % 2 else down))
