"""Schedules that alternate forwards and backwards. Memory grows with stages, not with microbatches."""

from collections.abc import Sequence
from itertools import chain

from meshpipe.plan.plan import Action, Op, Plan
from meshpipe.plan.schedules.order import loop
from meshpipe.plan.schedules.registry import schedule


@schedule("1f1b", stages_per_rank=(1, 1))
def one_f_one_b(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """One forward and one backward in turn once the pipeline is full. As fast as `gpipe`, with less memory.

    One stage per rank. With S stages of equal cost and M microbatches, the bubble fraction is (S - 1) / (M + S - 1).
    Stage s holds up to min(M, S - s) activations, so memory does not grow with M.

    Source: PipeDream-Flush, arXiv 2006.09503, section 3; Megatron, arXiv 2104.04473, section 2.2.
    """
    warmups = [num_ranks - 1 - rank for rank in range(num_ranks)]
    return _alternate("1f1b", [range(num_microbatches)], 1, warmups)


@schedule("eager-1f1b", stages_per_rank=(1, 1))
def eager_one_f_one_b(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """`1f1b` with twice as many forwards before the first backward, so that transfers overlap with computation.

    One stage per rank. If transfers take no time, the bubble fraction is that of `1f1b`, (S - 1) / (M + S - 1). If a
    transfer takes C, each further microbatch costs `1f1b` another 2 C (S - 1) / S once the pipeline is full. It costs
    this schedule nothing, as long as 2 C is at most the time of a forward and a backward. Stage s holds up to min(M,
    2 (S - s) - 1) activations.

    Source: arXiv 2211.05322, section 4; `OverlapFriendlyPipeDreamSchedule` of Alpa.
    """
    warmups = [2 * (num_ranks - 1 - rank) for rank in range(num_ranks)]
    return _alternate("eager-1f1b", [range(num_microbatches)], 1, warmups)


@schedule("interleaved-1f1b", stages_per_rank=(2, None))
def interleaved_one_f_one_b(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Plan:
    """`1f1b` with V stages per rank: the bubble is V times shorter, with more activations and more transfers.

    Stage s is on rank s mod R. Microbatches are taken in groups, and a rank runs all its V stages on one group before
    the next group. The source requires M to be a multiple of R, with groups of R. Here any M >= R is divided into
    M // R groups, larger groups first. With R ranks, M >= R and stages of equal cost, the bubble fraction is
    (R - 1) / (V M + R - 1). If M < R, every rank idles for another (V - 1) (R - M) forwards and backwards. Rank r holds
    up to min(V M, (V - 1) G + 2 (R - 1 - r) + 1) activations, where G is the size of the first group.

    Source: Megatron, arXiv 2104.04473, section 2.2.
    """
    groups = _share_out(num_microbatches, max(1, num_microbatches // num_ranks))
    first = (stages_per_rank - 1) * len(groups[0])
    warmups = [first + 2 * (num_ranks - 1 - rank) for rank in range(num_ranks)]
    return _alternate("interleaved-1f1b", groups, stages_per_rank, warmups)


def _alternate(name: str, groups: Sequence[range], stages_per_rank: int, warmups: Sequence[int]) -> Plan:
    """Each rank runs the forwards of its warm-up, then forwards and backwards in turn, then the remaining backwards."""
    num_ranks = len(warmups)
    cells = [(turn, microbatch) for group in groups for turn in range(stages_per_rank) for microbatch in group]
    orders = []
    for rank, warmup in enumerate(warmups):
        forwards = [Action(turn * num_ranks + rank, Op.FORWARD, microbatch) for turn, microbatch in cells]
        backwards = [
            Action((stages_per_rank - 1 - turn) * num_ranks + rank, Op.BACKWARD, microbatch)
            for turn, microbatch in cells
        ]
        begin = min(warmup, len(cells))
        steady = chain.from_iterable(zip(forwards[begin:], backwards, strict=False))
        orders.append((*forwards[:begin], *steady, *backwards[len(cells) - begin :]))
    return Plan(
        schedule=name,
        num_microbatches=sum(map(len, groups)),
        stage_ranks=loop(num_ranks, stages_per_rank),
        orders=tuple(orders),
        peak_activations=tuple(min(len(cells), warmup + 1) for warmup in warmups),
    )


def _share_out(count: int, num_groups: int) -> list[range]:
    """Consecutive numbers in groups whose sizes differ by at most one, the larger first."""
    sizes = [count // num_groups + (group < count % num_groups) for group in range(num_groups)]
    starts = [sum(sizes[:group]) for group in range(num_groups)]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
