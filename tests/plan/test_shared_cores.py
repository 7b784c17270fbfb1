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


def test_an_action_may_be_known_to_gain_less_from_idle_cores() -> None:
    plan = make_plan("gpipe", 2, 1)  # one rank at a time
    alone = {(0, Op.FORWARD): 1.5, (0, Op.BACKWARD): 2.0, (1, Op.FORWARD): 1.25}
    assert simulate(plan, Costs(TIMES, sharing=Sharing(2, 2.0), alone=alone)).makespan == pytest.approx(6.75)


def test_programs_of_several_devices_take_turns() -> None:
    plan = make_plan("gpipe", 2, 2)
    alone = {(stage, op): time / 2 for stage in range(2) for op, time in TIMES.items()}
    timeline = simulate(plan, Costs(TIMES, 0.5, sharing=Sharing(2, 2.0, in_turn=True), alone=alone))
    order = sorted(timeline.starts, key=lambda action: timeline.starts[action])
    assert list(map(str, order)) == ["0F0", "0F1", "1F0", "1F1", "1B0", "0B0", "1B1", "0B1"]
    # All work, and two waits for what has to come from the other rank: 1F1 and 0B1 have to wait for nothing else.
    assert [timeline.starts[action] for action in order] == [0, 1, 2, 3, 4, 6.5, 8.5, 11]
    # Hosts of their own wait for each other's results alone.
    apart = simulate(plan, Costs(TIMES, 0.5, sharing=Sharing(1, 1.0, in_turn=True)))
    assert apart.makespan == simulate(plan, Costs(TIMES, 0.5)).makespan


def test_sharing_needs_a_rank_and_its_speed() -> None:
    with pytest.raises(ValueError, match="at least 1 rank"):
        Sharing(0, 1.0)
