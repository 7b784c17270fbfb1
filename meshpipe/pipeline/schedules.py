"""The schedules: pure functions from sizes to a valid plan, under the names that users give."""

import difflib
from collections.abc import Iterable
from itertools import chain
from typing import Protocol

from meshpipe.pipeline.plan import Action, Op, Plan


class Schedule(Protocol):
    """A rule that makes the plan of any sizes; raises `ValueError` for sizes that do not fit it."""

    def __call__(self, num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan: ...


def gpipe(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """All forwards, then all backwards: the fewest changes of direction and the most memory.

    With several stages per rank, stage s is on rank s mod R and each stage runs all microbatches before the next
    stage of the rank, breadth first. With R ranks, V stages per rank and M microbatches, the bubble fraction is
    (R - 1) / (V M + R - 1) if M >= R, for forwards of equal cost and backwards of equal cost, and every rank holds up
    to V M activations. Backward takes the microbatches in ascending order too, which costs nothing and lets gradients
    accumulate as in the other schedules.

    Source: GPipe, arXiv 1811.06965, section 2.3; breadth first: arXiv 2211.05953, section 4.
    """
    _check_sizes("gpipe", num_ranks, num_microbatches, stages_per_rank)
    return Plan(
        schedule="gpipe",
        num_microbatches=num_microbatches,
        stage_ranks=_loop(num_ranks, stages_per_rank),
        orders=tuple(
            (
                *_sweep(Op.FORWARD, range(rank, num_ranks * stages_per_rank, num_ranks), num_microbatches),
                *_sweep(Op.BACKWARD, reversed(range(rank, num_ranks * stages_per_rank, num_ranks)), num_microbatches),
            )
            for rank in range(num_ranks)
        ),
        peak_activations=(stages_per_rank * num_microbatches,) * num_ranks,
    )


def one_f_one_b(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """One forward, one backward in turn once the pipeline is full: the time of `gpipe` in the memory of its depth.

    One stage per rank. With S stages and M microbatches, the bubble fraction is (S - 1) / (M + S - 1) for stages of
    equal cost, and stage s holds up to min(M, S - s) activations, whatever M is.

    Source: PipeDream-Flush, arXiv 2006.09503, section 3; Megatron, arXiv 2104.04473, section 2.2.
    """
    _check_sizes("1f1b", num_ranks, num_microbatches, stages_per_rank)
    return Plan(
        schedule="1f1b",
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(num_ranks)),
        orders=tuple(
            _one_forward_one_backward(stage, num_microbatches, warmup=min(num_microbatches, num_ranks - stage - 1))
            for stage in range(num_ranks)
        ),
        peak_activations=tuple(min(num_microbatches, num_ranks - stage) for stage in range(num_ranks)),
    )


def forward_only(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """Forwards alone, for evaluation: with several stages per rank in the order of `gpipe`; holds no activations.

    The bubble fraction is that of `gpipe`.
    """
    _check_sizes("forward_only", num_ranks, num_microbatches, stages_per_rank)
    return Plan(
        schedule="forward_only",
        num_microbatches=num_microbatches,
        stage_ranks=_loop(num_ranks, stages_per_rank),
        orders=tuple(
            _sweep(Op.FORWARD, range(rank, num_ranks * stages_per_rank, num_ranks), num_microbatches)
            for rank in range(num_ranks)
        ),
        peak_activations=(0,) * num_ranks,
    )


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""The schedules to train with, by public name."""

SEVERAL_STAGES = ("gpipe",)
"""Names of the schedules that take more than one stage per rank."""


def make_plan(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """The plan of the schedule with this name. Raises `ValueError` for an unknown name or sizes that do not fit it."""
    if name not in SCHEDULES:
        nearest = difflib.get_close_matches(name.lower(), SCHEDULES, n=1, cutoff=0.5)
        suggestion = f" Did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"The schedule must be one of {', '.join(SCHEDULES)}. Got {name!r}.{suggestion}")
    return SCHEDULES[name](num_ranks, num_microbatches, stages_per_rank)


def _check_sizes(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    sizes = {"ranks": num_ranks, "microbatches": num_microbatches, "stages per rank": stages_per_rank}
    for what, size in sizes.items():
        if size < 1:
            raise ValueError(f"A plan needs at least 1 of its {what}. Got {size}.")
    if stages_per_rank > 1 and name in SCHEDULES and name not in SEVERAL_STAGES:
        raise ValueError(
            f"The schedule {name} takes one stage per rank. Got {stages_per_rank}. "
            f"Take one, or a schedule that takes several: {', '.join(SEVERAL_STAGES)}."
        )


def _loop(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """Stages dealt to the ranks in turn: stage s on rank s mod R."""
    return tuple(range(num_ranks)) * stages_per_rank


def _sweep(op: Op, stages: Iterable[int], num_microbatches: int) -> tuple[Action, ...]:
    return tuple(Action(stage, op, microbatch) for stage in stages for microbatch in range(num_microbatches))


def _one_forward_one_backward(stage: int, num_microbatches: int, warmup: int) -> tuple[Action, ...]:
    forwards = _sweep(Op.FORWARD, (stage,), num_microbatches)
    backwards = _sweep(Op.BACKWARD, (stage,), num_microbatches)
    steady = chain.from_iterable(zip(forwards[warmup:], backwards, strict=False))
    return (*forwards[:warmup], *steady, *backwards[num_microbatches - warmup :])
