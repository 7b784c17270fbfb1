"""Schedules that split backward in two: the gradient of the input, which others wait for, and those of the weights.

Their papers call these B and W; here they are I and W, and an activation counts as held from F until W. What I frees is
not seen by that count; give `simulate` the bytes to see it. Of ranks that end one after the other as they have begun,
the papers do not call the steps down at both ends a bubble, as the next step can fill them; `Timeline.period` counts
like that, `Timeline.makespan` is the time of a step alone.
"""

from meshpipe.plan.plan import Plan
from meshpipe.plan.schedules.order import Order, zigzag
from meshpipe.plan.schedules.registry import schedule


@schedule("zb-h1", stages_per_rank=(1, 1))
def zb_h1(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """`1f1b` with a third of its bubble in its memory: weights wait as long as memory that rank 0 needs anyhow allows.

    One stage per rank; on rank r, W follows I by r microbatches. With R ranks, M >= R microbatches and F, I and W the
    times of the three parts, where W is the least, ranks idle for (R - 1) (F + I - W); that is a bubble fraction of
    (R - 1) / (3 M + R - 1) if they are equal. With M < R it is another (R - M) W. Every rank holds up to min(M, R)
    activations: rank 0 as many as in `1f1b`, the others up to that number, of which all but R - r have only what W
    needs.

    Source: Zero Bubble, arXiv 2401.10241, section 2.1.
    """
    warmups = [num_ranks - rank for rank in range(num_ranks)]
    return _one_stage_per_rank("zb-h1", num_microbatches, warmups)


@schedule("zb-h2", stages_per_rank=(1, 1))
def zb_h2(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """No bubble between steps, in twice the memory: further forwards fill the time until the first backward arrives.

    One stage per rank; on rank r, W follows I by 2 r microbatches. With R ranks, M >= 2 R - 1 microbatches and F, I and
    W the times of the three parts, a step that follows another takes (R - 1) (F + I - 2 W) longer than its work, or
    nothing if that is negative: nothing if the three are equal. With M fewer, and equal times, it is 2 R - 1 - M units.
    A step alone has to wait (R - 1) F for the last rank to begin, and takes no less than `zb-h1` if the times are
    equal. Every rank holds up to min(M, 2 R - 1) activations.

    Source: Zero Bubble, arXiv 2401.10241, section 2.2.
    """
    warmups = [2 * (num_ranks - rank) - 1 for rank in range(num_ranks)]
    return _one_stage_per_rank("zb-h2", num_microbatches, warmups)


@schedule("zb-v", stages_per_rank=(2, 2))
def zb_v(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Plan:
    """No bubble between steps, in the memory of `1f1b`: stages go to the last rank and back, in the shape of a V.

    Two stages per rank, r and 2 R - 1 - r on rank r, so that each has a stage whose activations live long and one whose
    live shortly. With R ranks, M >= 2 R - 1 microbatches and F = I = W, a step that follows another takes as long as
    its work; with M fewer, 2 (2 R - 1 - M) units longer. Other times leave a bubble that no formula gives; `auto` fits
    the order to them. A step alone waits R - 1 units for the last rank to begin, half as long as in `zb-h1` as stages
    are half as large. Rank r holds up to min(2 M, M + r + 1, 2 R) activations, each of half a rank's layers.

    Source: arXiv 2405.15362 (V-ZB); first in Zero Bubble, arXiv 2401.10241 (ZB-V). Fewer microbatches than 2 R - 1 are
    those of a longer order, the rest left out.
    """
    length = max(num_microbatches, 2 * num_ranks - 1)
    return Plan(
        schedule="zb-v",
        num_microbatches=num_microbatches,
        stage_ranks=zigzag(num_ranks, stages_per_rank),
        orders=tuple(_v_order(rank, num_ranks, length).up_to(num_microbatches) for rank in range(num_ranks)),
        peak_activations=tuple(
            min(2 * num_microbatches, num_microbatches + rank + 1, 2 * num_ranks) for rank in range(num_ranks)
        ),
    )


def _one_stage_per_rank(name: str, num_microbatches: int, warmups: list[int]) -> Plan:
    """Each rank has its warm-up of forwards in flight; weights wait so that it holds as many activations as rank 0."""
    orders = []
    for rank, warmup in enumerate(warmups):
        order = Order()
        for _ in range(warmup):
            order.forward(rank)
        for _ in range(num_microbatches):
            order.backward_input(rank)
            if order.waiting(rank) > warmups[0] - warmup:
                order.backward_weight(rank)
            order.forward(rank)
        while order.waiting(rank):
            order.backward_weight(rank)
        orders.append(order.up_to(num_microbatches))
    return Plan(
        schedule=name,
        num_microbatches=num_microbatches,
        stage_ranks=tuple(range(len(warmups))),
        orders=tuple(orders),
        peak_activations=(min(num_microbatches, warmups[0]),) * len(warmups),
    )


def _v_order(rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """One rank of `zb-v` for at least 2 R - 1 microbatches."""
    order = Order()
    down, up = rank, 2 * num_ranks - 1 - rank  # the stages on the two arms of the V
    for _ in range(2 * (num_ranks - rank) - 1):
        order.forward(down)
    for _ in range(rank):
        order.forward(up)
        order.forward(down)
    for _ in range(num_ranks - rank):
        order.forward(up)
        _whole_backward(order, up)
    while order.forwards(up) < num_microbatches:
        if order.forwards(down) < num_microbatches:
            order.forward(down)
        _whole_backward(order, down)
        order.forward(up)
        _whole_backward(order, up)
    for _ in range(rank):
        order.backward_input(down)
        order.backward_input(up)
    while order.backwards(down) < num_microbatches:
        _whole_backward(order, down)
    for stage in (up, down):
        while order.waiting(stage):
            order.backward_weight(stage)
    return order


def _whole_backward(order: Order, stage: int) -> None:
    order.backward_input(stage)
    order.backward_weight(stage)
