"""DualPipe-V: two stages per rank, and a forward and a backward in pairs that can overlap."""

from collections import deque

from meshpipe.plan.plan import Plan
from meshpipe.plan.schedules.order import Order, zigzag
from meshpipe.plan.schedules.registry import schedule


@schedule("dualpipe-v", stages_per_rank=(2, 2))
def dualpipe_v(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Plan:
    """Pairs of a forward and a backward of different stages, so that one can compute while the other communicates.

    Two stages per rank in the shape of a V: stages r and 2 R - 1 - r are on rank r. Most backwards are not split. Let
    F, B and W be the times of a forward, a whole backward and its weight part. With R ranks and M >= 2 R microbatches,
    a rank idles for at most (R - 1) ((F + B) + B - 3 W), which is the formula of the source without overlap inside a
    pair. Here the two parts of a pair run one after the other, and the idle time is (R - 1) F if B = 2 F = 2 W. Rank r
    holds up to min(2 M, M + r + 1, 2 R + 1) activations, each of half the layers of a rank. With M < 2 R, the order is
    that for 2 R microbatches without the missing ones.

    Source: DualPipe, arXiv 2412.19437, section 3.2.1, and its README; the V shape is sail-sg's "cut-in-half".
    """
    length = max(num_microbatches, 2 * num_ranks)
    return Plan(
        schedule="dualpipe-v",
        num_microbatches=num_microbatches,
        stage_ranks=zigzag(num_ranks, stages_per_rank),
        orders=tuple(_order(rank, num_ranks, length).up_to(num_microbatches) for rank in range(num_ranks)),
        peak_activations=tuple(
            min(2 * num_microbatches, num_microbatches + rank + 1, 2 * num_ranks + 1) for rank in range(num_ranks)
        ),
    )


def _order(rank: int, num_ranks: int, num_microbatches: int) -> Order:
    """One rank for at least 2 R microbatches, in the eight steps of the source."""
    order = Order()
    down, up = rank, 2 * num_ranks - 1 - rank  # the stages on the two arms of the V
    beyond = num_ranks - 1 - rank  # ranks further down
    for _ in range(2 * beyond):
        order.forward(down)
    for _ in range(rank + 1):
        order.forward(down)
        order.forward(up)
    for _ in range(beyond):
        order.backward_input(up)
        order.backward_weight(up)
        order.forward(up)
    while order.forwards(down) < num_microbatches:
        order.forward(down)
        order.backward(up)
        order.forward(up)
        order.backward(down)
    for _ in range(beyond):
        order.backward(up)
        order.forward(up)
        order.backward(down)
    late: deque[int] = deque()  # stages whose weights wait
    for number in range(2 * (rank + 1)):
        stage = down if number % 2 else up
        if number > rank:
            order.backward_input(stage)
            late.append(stage)
        else:
            order.backward(stage)
    for _ in range(beyond):
        order.backward_weight(late.popleft())
        order.backward_input(down)
        late.append(down)
    while late:
        order.backward_weight(late.popleft())
    return order
