"""Registers schedules: `@schedule(...)` above a function gives it its public name and the sizes that it allows."""

import functools
from collections.abc import Callable
from typing import Protocol

from meshpipe.plan.plan import Plan


class Schedule(Protocol):
    """A function that makes the plan for given sizes; raises `ValueError` for sizes that it does not allow."""

    def __call__(self, num_ranks: int, num_microbatches: int, stages_per_rank: int = ..., /) -> Plan: ...


SCHEDULES: dict[str, Schedule] = {}
"""The schedules by public name; all but `inference` train."""

STAGES_PER_RANK: dict[str, tuple[int, int | None]] = {}
"""The fewest and the most stages per rank that a schedule allows, by its name; None is no limit."""


def schedule(name: str, *, stages_per_rank: tuple[int, int | None]) -> Callable[[Schedule], Schedule]:
    """Registers the decorated function as a schedule, and checks the sizes that it is called with.

    Arguments:
        name: Its public name, for `PipelineConfig.schedule` and `--schedule`.
        stages_per_rank: The fewest stages per rank that it allows, which is also the default, and the most; None is no
            limit.
    """
    least, _ = stages_per_rank

    def register(make: Schedule) -> Schedule:
        @functools.wraps(make)
        def checked(num_ranks: int, num_microbatches: int, stages_per_rank: int = least, /) -> Plan:
            _check_sizes(name, num_ranks, num_microbatches, stages_per_rank)
            return make(num_ranks, num_microbatches, stages_per_rank)

        SCHEDULES[name], STAGES_PER_RANK[name] = checked, stages_per_rank
        return checked

    return register


def takes_stages(name: str, stages_per_rank: int) -> bool:
    least, most = STAGES_PER_RANK[name]
    return least <= stages_per_rank and (most is None or stages_per_rank <= most)


def _check_sizes(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    sizes = {"ranks": num_ranks, "microbatches": num_microbatches, "stages per rank": stages_per_rank}
    for what, size in sizes.items():
        if size < 1:
            raise ValueError(f"A plan needs at least 1 of its {what}. Got {size}.")
    if takes_stages(name, stages_per_rank):
        return
    least, most = STAGES_PER_RANK[name]
    number = {1: "one", 2: "two"}.get(least, str(least))
    others = [other for other in STAGES_PER_RANK if other != "inference" and takes_stages(other, stages_per_rank)]
    raise ValueError(
        f"The schedule {name} takes {'' if most else 'at least '}{number} stage{'s' if least > 1 else ''} per rank. "
        f"Got {stages_per_rank}. Take {number}{'' if most else ' or more'}, or a schedule that takes "
        f"{'one' if stages_per_rank == 1 else 'several'}: {', '.join(others)}."
    )
