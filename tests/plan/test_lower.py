"""Lowering, written as text, and checked by carrying random lowered plans out on names."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpipe.plan.lower import Buffer, Compute, Free, LoweredPlan, Transfer, lower, order_actions
from meshpipe.plan.plan import Plan
from meshpipe.plan.schedules import SCHEDULES, forwards_of, make_plan, takes_stages
from meshpipe.plan.validate import validate


def plan_of(*rows: str, stage_ranks: str, microbatches: int = 1) -> Plan:
    ranks = "".join(f"rank {rank}: {row}\n" for rank, row in enumerate(rows))
    plan = Plan.parse(f"schedule: mine\nmicrobatches: {microbatches}\nstage ranks: {stage_ranks}\n{ranks}")
    validate(plan)
    return plan


def test_one_stage_needs_no_boundary() -> None:
    lowered = lower(make_plan("1f1b", 1, 2))
    assert (
        lowered.to_text()
        == """\
0F0: -> r0.0
0B0: r0.0 ->
free r0.0
0F1: -> r0.1
0B1: r0.1 ->
free r0.1
"""
    )


def test_outputs_that_are_asked_for_stay() -> None:
    plan = forwards_of(make_plan("1f1b", 2, 2), 1)
    assert (
        lower(plan, outputs=True).to_text()
        == """\
0F0: -> y0.0
move y0.0 -> x1.0
free y0.0
1F0: x1.0 -> o1.0
free x1.0
"""
    )


def test_two_ranks_exchange_activations_and_gradients() -> None:
    assert (
        lower(make_plan("1f1b", 2, 2)).to_text()
        == """\
0F0: -> r0.0 y0.0
move y0.0 -> x1.0
free y0.0
0F1: -> r0.1 y0.1
move y0.1 -> x1.1
free y0.1
1F0: x1.0 -> r1.0
free x1.0
1B0: r1.0 -> dx1.0
free r1.0
move dx1.0 -> dy0.0
free dx1.0
0B0: r0.0 dy0.0 ->
free r0.0 dy0.0
1F1: x1.1 -> r1.1
free x1.1
1B1: r1.1 -> dx1.1
free r1.1
move dx1.1 -> dy0.1
free dx1.1
0B1: r0.1 dy0.1 ->
free r0.1 dy0.1
"""
    )


def test_stages_of_one_rank_hand_over_in_place() -> None:
    assert (
        lower(make_plan("gpipe", 1, 1, 3)).to_text()
        == """\
0F0: -> r0.0 x1.0
1F0: x1.0 -> r1.0 x2.0
free x1.0
2F0: x2.0 -> r2.0
free x2.0
2B0: r2.0 -> dy1.0
free r2.0
1B0: r1.0 dy1.0 -> dy0.0
free r1.0 dy1.0
0B0: r0.0 dy0.0 ->
free r0.0 dy0.0
"""
    )


def test_a_loop_of_stages_goes_back_to_the_first_rank() -> None:
    lowered = lower(make_plan("gpipe", 2, 1, 2))
    moves = [str(instruction) for instruction in lowered.instructions if isinstance(instruction, Transfer)]
    assert moves == [
        "move y0.0 -> x1.0",
        "move y1.0 -> x2.0",
        "move y2.0 -> x3.0",
        "move dx3.0 -> dy2.0",
        "move dx2.0 -> dy1.0",
        "move dx1.0 -> dy0.0",
    ]


def test_split_backward_keeps_what_the_weights_need() -> None:
    plan = plan_of("0F0 0I0 0W0", "1F0 1I0 1W0", stage_ranks="0 1")
    assert (
        lower(plan).to_text()
        == """\
0F0: -> r0.0 y0.0
move y0.0 -> x1.0
free y0.0
1F0: x1.0 -> r1.0
free x1.0
1I0: r1.0 -> dx1.0 w1.0
free r1.0
move dx1.0 -> dy0.0
free dx1.0
0I0: r0.0 dy0.0 -> w0.0
free r0.0 dy0.0
1W0: w1.0 ->
free w1.0
0W0: w0.0 ->
free w0.0
"""
    )


def test_forwards_alone_keep_nothing() -> None:
    assert (
        lower(make_plan("inference", 2, 2)).to_text()
        == """\
0F0: -> y0.0
move y0.0 -> x1.0
free y0.0
0F1: -> y0.1
move y0.1 -> x1.1
free y0.1
1F0: x1.0 ->
free x1.0
1F1: x1.1 ->
free x1.1
"""
    )


def test_a_rank_sees_its_work_and_both_sides_of_its_transfers() -> None:
    lowered = lower(make_plan("gpipe", 3, 1))
    assert [str(instruction) for instruction in lowered.of_rank(1)] == [
        "move y0.0 -> x1.0",
        "1F0: x1.0 -> r1.0 y1.0",
        "free x1.0",
        "move y1.0 -> x2.0",
        "free y1.0",
        "move dx2.0 -> dy1.0",
        "1B0: r1.0 dy1.0 -> dx1.0",
        "free r1.0 dy1.0",
        "move dx1.0 -> dy0.0",
        "free dx1.0",
    ]


def test_no_rank_is_issued_far_ahead_of_the_others() -> None:
    actions = " ".join(map(str, order_actions(make_plan("1f1b", 3, 3))))
    assert actions == "0F0 0F1 1F0 0F2 1F1 2F0 2B0 1B0 2F1 0B0 1F2 2B1 1B1 2F2 0B1 2B2 1B2 0B2"


def carry_out(lowered: LoweredPlan) -> None:
    """Follows the instructions with sets of names for arrays: what is read is there, and at the end nothing is."""
    held: list[set[Buffer]] = [set() for _ in range(lowered.plan.num_ranks)]
    for instruction in lowered.instructions:
        match instruction:
            case Compute(rank, _, reads, writes):
                assert held[rank].issuperset(reads)
                assert held[rank].isdisjoint(writes)
                held[rank].update(writes)
            case Transfer(source, target, source_rank, target_rank):
                assert source_rank != target_rank
                assert source in held[source_rank]
                assert target not in held[target_rank]
                held[target_rank].add(target)
            case Free(rank, buffers):
                assert held[rank].issuperset(buffers)
                held[rank].difference_update(buffers)
    assert not any(held)


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=25)
@given(num_ranks=st.integers(1, 6), num_microbatches=st.integers(1, 10), stages_per_rank=st.integers(1, 3))
def test_every_lowered_plan_can_be_carried_out(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int
) -> None:
    accepted = stages_per_rank if takes_stages(name, stages_per_rank) else None
    lowered = lower(make_plan(name, num_ranks, num_microbatches, accepted))
    carry_out(lowered)
    for rank, order in enumerate(lowered.plan.orders):
        computes = [i.action for i in lowered.of_rank(rank) if isinstance(i, Compute)]
        assert computes == list(order)


def test_a_stage_reduces_after_its_last_action_and_what_that_hands_on() -> None:
    expected = """\
0F0: -> r0.0 y0.0
move y0.0 -> x1.0
free y0.0
1F0: x1.0 -> r1.0
free x1.0
1B0: r1.0 -> dx1.0
free r1.0
move dx1.0 -> dy0.0
free dx1.0
reduce 1
0B0: r0.0 dy0.0 ->
free r0.0 dy0.0
reduce 0
"""
    assert lower(make_plan("1f1b", 2, 1), reduces=True).to_text() == expected


def test_a_transfer_directly_follows_the_action_that_makes_its_source() -> None:
    latest = None
    for instruction in lower(make_plan("1f1b", 4, 8)).instructions:
        if isinstance(instruction, Compute):
            latest = instruction
        if isinstance(instruction, Transfer):
            assert latest is not None
            assert instruction.source in latest.writes


@pytest.mark.slow
def test_large_plans_are_made_and_lowered_in_seconds() -> None:
    """64 stages and 256 microbatches take about one second; work that grew with the square would take hours."""
    code = """
import time
from meshpipe.plan.lower import lower
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.validate import validate
for name, num_ranks in (("1f1b", 64), ("zb-h1", 64), ("zb-v", 32)):
    begin = time.process_time()
    plan = make_plan(name, num_ranks, 256)
    validate(plan)
    lowered = lower(plan)
    assert plan.num_stages == 64
    print(time.process_time() - begin)
"""
    # In a process of its own, so that no instrumentation of the tests counts.
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert all(float(line) < 4 for line in result.stdout.split())
