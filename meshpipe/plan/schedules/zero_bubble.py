"""Schedules that split backward into the gradient of the input, for which other ranks wait, and those of the weights.

The papers call the two parts B and W; here they are I and W. An activation counts as held from F until W, although I
frees a part of it; pass bytes to `simulate` to count that too. The papers do not count the staggered start and end of
the ranks as a bubble, because the next step can fill them. `Timeline.period` follows the papers; `Timeline.makespan` is
the time of a step by itself.
"""

from meshpipe.plan.plan import Plan
from meshpipe.plan.schedules.order import Order, zigzag
from meshpipe.plan.schedules.registry import schedule


@schedule("zb-h1", stages_per_rank=(1, 1))
def zb_h1(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """A third of the bubble of `1f1b` in the memory of its first rank: weight parts fill the idle time.

    One stage per rank; on rank r, W follows I by r microbatches. Let F, I and W be the times of the three parts, with W
    the shortest. With R ranks and M >= R microbatches, a rank idles for (R - 1) (F + I - W). If the three are equal,
    the bubble fraction is (R - 1) / (3 M + R - 1). If M < R, a rank idles for another (R - M) W. Every rank holds up to
    min(M, R) activations, as many as rank 0 of `1f1b`. On rank r, all but R - r of them hold only what W needs.

    Source: Zero Bubble, arXiv 2401.10241, section 2.1.
    """
    warmups = [num_ranks - rank for rank in range(num_ranks)]
    return _one_stage_per_rank("zb-h1", num_microbatches, warmups)


@schedule("zb-h2", stages_per_rank=(1, 1))
def zb_h2(num_ranks: int, num_microbatches: int, stages_per_rank: int = 1) -> Plan:
    """No bubble between steps, in twice the memory: more forwards fill the time until the first backward arrives.

    One stage per rank; on rank r, W follows I by 2 r microbatches. Let F, I and W be the times of the three parts. With
    R ranks and M >= 2 R - 1 microbatches, a step that follows another idles for max(0, (R - 1) (F + I - 2 W)), which is
    0 if the three are equal. With fewer microbatches and equal times, it idles for 2 R - 1 - M units. A step by itself
    also waits (R - 1) F until the last rank begins; with equal times it is no shorter than one of `zb-h1`. Every rank
    holds up to min(M, 2 R - 1) activations.

    Source: Zero Bubble, arXiv 2401.10241, section 2.2.
    """
    warmups = [2 * (num_ranks - rank) - 1 for rank in range(num_ranks)]
    return _one_stage_per_rank("zb-h2", num_microbatches, warmups)


@schedule("zb-v", stages_per_rank=(2, 2))
def zb_v(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Plan:
    """No bubble between steps, in the memory of `1f1b`: the stages run to the last rank and back, in the shape of a V.

    Two stages per rank: stages r and 2 R - 1 - r are on rank r. So every rank has one stage whose activations live long
    and one whose activations live briefly. With R ranks, M >= 2 R - 1 microbatches and F = I = W, a step that follows
    another has no idle time; with fewer microbatches it idles for 2 (2 R - 1 - M) units. No formula is known for
    unequal times; the schedule `auto` fits the order to them. A step by itself also waits R - 1 units until the last
    rank begins. That is half the wait of `zb-h1`, because stages are half as large. Rank r holds up to min(2 M,
    M + r + 1, 2 R) activations, each of half the layers of a rank. With M < 2 R - 1, the order is that for 2 R - 1
    microbatches without the missing ones.

    Source: arXiv 2405.15362 (V-ZB); first in Zero Bubble, arXiv 2401.10241 (ZB-V).
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
    """Each rank keeps its warm-up of forwards in flight, and delays weight parts until it holds as many activations as
    rank 0.
    """
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
