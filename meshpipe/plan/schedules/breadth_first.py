"""Schedules that run a stage on all microbatches before the next stage."""

from dataclasses import replace

from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.schedules.order import loop, sweep
from meshpipe.plan.schedules.registry import schedule


@schedule("gpipe", stages_per_rank=(1, None))
def gpipe(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """All forwards, then all backwards: the fewest changes of direction and the most memory.

    With several stages per rank, stage s is on rank s mod R and each stage runs all microbatches before the next
    stage of the rank, breadth first. With R ranks, V stages per rank and M microbatches, the bubble fraction is
    (R - 1) / (V M + R - 1) if M >= R, for forwards of equal cost and backwards of equal cost, and every rank holds up
    to V M activations. With M < R, every rank idles for another (V - 1) (R - M) forwards and backwards. Backward takes
    microbatches in ascending order too, which costs nothing and lets gradients accumulate as in the other schedules.

    Source: GPipe, arXiv 1811.06965, section 2.3; breadth first: arXiv 2211.05953, section 4.
    """
    return _breadth_first("gpipe", num_ranks, num_microbatches, stages_per_rank)


@schedule("looped-bfs", stages_per_rank=(2, None))
def looped_bfs(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Plan:
    """The order of `gpipe` around a loop of at least two stages per rank: a bubble V times shorter.

    Time and memory are those of `gpipe`: a bubble fraction of (R - 1) / (V M + R - 1) if M >= R, and up to V M
    activations on every rank. As each stage runs all its microbatches without a break, what concerns its parameters as
    a whole (their gathering, the reduction of their gradients over data-parallel replicas) happens once per step.

    Source: Breadth-first pipeline parallelism, arXiv 2211.05953, section 4.
    """
    return _breadth_first("looped-bfs", num_ranks, num_microbatches, stages_per_rank)


@schedule("inference", stages_per_rank=(1, None))
def inference(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """Forwards alone, with several stages per rank in the order of `gpipe`; holds no activations, and trains nothing.

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


def forwards_of(plan: Plan) -> Plan:
    """The forwards of a plan, in its order and on its ranks: evaluation for stages that are placed to be trained."""
    return replace(
        plan,
        schedule="inference",
        orders=tuple(tuple(action for action in order if action.op is Op.FORWARD) for order in plan.orders),
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
