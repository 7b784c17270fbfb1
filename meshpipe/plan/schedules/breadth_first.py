"""Schedules that run a stage on all microbatches before the next stage."""

from dataclasses import replace

from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.schedules.order import loop, sweep
from meshpipe.plan.schedules.registry import schedule


@schedule("gpipe", stages_per_rank=(1, None))
def gpipe(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """All forwards, then all backwards. Simple, and the schedule that holds the most activations.

    Stage s is on rank s mod R. A rank runs all microbatches of one stage before those of its next stage (breadth
    first). With R ranks, V stages per rank and M microbatches, the bubble fraction is (R - 1) / (V M + R - 1) if
    M >= R, all forwards cost the same and all backwards cost the same. Every rank holds up to V M activations. If
    M < R, every rank idles for another (V - 1) (R - M) forwards and backwards. Backward also takes microbatches in
    ascending order, so gradients accumulate in the same order as in the other schedules.

    Source: GPipe, arXiv 1811.06965, section 2.3; breadth first: arXiv 2211.05953, section 4.
    """
    return _breadth_first("gpipe", num_ranks, num_microbatches, stages_per_rank)


@schedule("looped-bfs", stages_per_rank=(2, None))
def looped_bfs(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Plan:
    """The order of `gpipe` with at least two stages per rank, which makes the bubble V times shorter.

    As in `gpipe`, the bubble fraction is (R - 1) / (V M + R - 1) if M >= R, and every rank holds up to V M activations.
    Each stage runs all its microbatches without a break. So its parameters are gathered once per step, and its
    gradients are reduced over data-parallel replicas once per step.

    Source: Breadth-first pipeline parallelism, arXiv 2211.05953, section 4.
    """
    return _breadth_first("looped-bfs", num_ranks, num_microbatches, stages_per_rank)


@schedule("inference", stages_per_rank=(1, None))
def inference(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """Only forwards, in the order of `gpipe`. It trains nothing and keeps no activations.

    The bubble fraction is that of `gpipe`.
    """
    return Plan(
        schedule="inference",
        num_microbatches=num_microbatches,
        stage_ranks=loop(num_ranks, stages_per_rank),
        orders=tuple(
            sweep(Op.FORWARD, range(rank, num_ranks * stages_per_rank, num_ranks), num_microbatches)
            for rank in range(num_ranks)
        ),
        peak_activations=(0,) * num_ranks,
    )


def forwards_of(plan: Plan, num_microbatches: int | None = None) -> Plan:
    """The forwards of a training plan, in its order and on its ranks, for evaluation and prediction.

    With `num_microbatches`, only those of its first microbatches.
    """
    count = plan.num_microbatches if num_microbatches is None else num_microbatches
    return replace(
        plan,
        schedule="inference",
        num_microbatches=count,
        orders=tuple(
            tuple(action for action in order if action.op is Op.FORWARD and action.microbatch < count)
            for order in plan.orders
        ),
        peak_activations=(0,) * plan.num_ranks,
    )


def _breadth_first(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Plan:
    orders = []
    for rank in range(num_ranks):
        stages = range(rank, num_ranks * stages_per_rank, num_ranks)
        forwards = sweep(Op.FORWARD, stages, num_microbatches)
        orders.append((*forwards, *sweep(Op.BACKWARD, reversed(stages), num_microbatches)))
    return Plan(
        schedule=name,
        num_microbatches=num_microbatches,
        stage_ranks=loop(num_ranks, stages_per_rank),
        orders=tuple(orders),
        peak_activations=(stages_per_rank * num_microbatches,) * num_ranks,
    )
