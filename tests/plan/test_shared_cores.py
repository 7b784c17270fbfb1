"""Ranks that share the cores of a host: times by hand."""

import pytest

from meshpipe.plan.plan import Op
from meshpipe.plan.schedules import SCHEDULES, make_plan
from meshpipe.plan.shared_cores import Sharing
from meshpipe.plan.simulate import Costs, simulate

TIMES = {Op.FORWARD: 2.0, Op.BACKWARD: 4.0}


def test_a_rank_is_faster_while_the_others_idle() -> None:
    timeline = simulate(make_plan("gpipe", 2, 1), Costs(TIMES, sharing=Sharing(2, 2.0)))
    assert {str(action): start for action, start in timeline.starts.items()} == {
        "0F0": 0,
        "1F0": 1,
        "1B0": 2,
        "0B0": 4,
    }
    assert timeline.makespan == 6


def test_ranks_of_other_hosts_have_cores_of_their_own() -> None:
    timeline = simulate(make_plan("gpipe", 2, 4), Costs(TIMES, sharing=Sharing(1, 1.0)))
    assert timeline.makespan == simulate(make_plan("gpipe", 2, 4), Costs(TIMES)).makespan


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in ("inference", "auto")])
def test_shared_cores_are_never_idle_if_one_rank_can_use_all(schedule: str) -> None:
    plan = make_plan(schedule, 4, 8)
    times = {Op.FORWARD: 2.0, Op.BACKWARD: 4.0, Op.BACKWARD_INPUT: 2.0, Op.BACKWARD_WEIGHT: 2.0}
    work = sum(times[action.op] for action in plan.actions)
    assert simulate(plan, Costs(times, sharing=Sharing(4, 4.0))).makespan == pytest.approx(work / 4)
    # With no more than its own share for each, the plan has its bubble.
    assert simulate(plan, Costs(times, sharing=Sharing(4, 1.0))).makespan == pytest.approx(
        simulate(plan, Costs(times)).makespan
    )


def test_sharing_needs_a_rank_and_its_speed() -> None:
    with pytest.raises(ValueError, match="at least 1 rank"):
        Sharing(0, 1.0)
