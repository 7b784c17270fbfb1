"""One function predicts a step for `advise` and `plan --target`: devices, their host, and shared cores."""

from dataclasses import replace

import pytest

from meshpipe.choose.step_time import SECONDS_PER_ACTION, least_step, step_time
from meshpipe.hardware.catalogue import find_hardware
from meshpipe.plan.plan import Op
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.simulate import Costs

H100 = find_hardware("h100")
PLAN = make_plan("1f1b", 4, 8)
COSTS = Costs({Op.FORWARD: 1.0, Op.BACKWARD: 2.0})


def test_a_step_is_its_plan_and_what_the_slowest_rank_does_around_it() -> None:
    time = step_time(PLAN, COSTS, [0.5, 0.25, 0.0, 0.0], H100, 2)
    assert time.host == 0
    assert time.seconds == time.timeline.makespan + 0.5


def test_tiny_actions_wait_for_the_host_that_starts_them() -> None:
    tiny = Costs({Op.FORWARD: 1e-6, Op.BACKWARD: 2e-6})
    actions = sum(map(len, PLAN.orders))
    assert step_time(PLAN, tiny, [0.0] * 4, H100, 2).seconds == pytest.approx(SECONDS_PER_ACTION * actions)
    # Each of four hosts starts the actions of one rank.
    assert step_time(PLAN, tiny, [0.0] * 4, H100, 8).seconds == pytest.approx(SECONDS_PER_ACTION * actions / 4)


def test_devices_that_share_cores_fill_bubbles() -> None:
    shared = replace(H100, alone=4.0, devices_per_host=4)
    work = sum(COSTS.time_of(action) for action in PLAN.actions)
    time = step_time(PLAN, COSTS, [1.0, 0.0, 0.0, 0.0], shared, 1)
    assert time.seconds == pytest.approx((work + 1.0) / 4)
    assert step_time(PLAN, COSTS, [0.0] * 4, H100, 1).seconds > 1.2 * work / 4


@pytest.mark.parametrize("alone", [1.0, 1.5, 4.0])
def test_no_step_is_shorter_than_its_bound(alone: float) -> None:
    hardware = replace(H100, alone=alone, devices_per_host=4)
    around = [0.5, 0.0, 1.0, 0.0]
    busy = [sum(map(COSTS.time_of, order)) for order in PLAN.orders]
    least = least_step(max(busy), busy, [len(order) for order in PLAN.orders], around, hardware, 1)
    assert step_time(PLAN, COSTS, around, hardware, 1).seconds >= least * (1 - 1e-9)
