"""The simulator: times by hand, and what is counted from them."""

import pytest

from meshpipe.plan.plan import Action, Op, Plan, PlanError
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.simulate import Costs, StageMemory, simulate


def starts_of(plan: Plan, costs: Costs) -> dict[str, float]:
    return {str(action): start for action, start in simulate(plan, costs).starts.items()}


def test_times_of_two_stages_with_default_costs() -> None:
    timeline = simulate(make_plan("1f1b", 2, 2))
    starts = {str(action): start for action, start in timeline.starts.items()}
    assert starts == {"0F0": 0, "0F1": 1, "0B0": 4, "0B1": 7, "1F0": 1, "1B0": 2, "1F1": 4, "1B1": 5}
    assert timeline.ends[Action.parse("0B1")] == timeline.makespan == 9
    assert timeline.busy == (6, 6)
    assert timeline.bubble_fraction == pytest.approx(1 / 3)
    assert timeline.peak_activations == (2, 1)


def test_a_transfer_delays_only_other_ranks() -> None:
    costs = Costs({Op.BACKWARD: 1.0}, transfer=0.25)
    assert starts_of(make_plan("gpipe", 2, 1), costs) == {"0F0": 0, "1F0": 1.25, "1B0": 2.25, "0B0": 3.5}
    assert starts_of(make_plan("gpipe", 1, 1, 2), costs) == {"0F0": 0, "1F0": 1, "1B0": 2, "0B0": 3}


def test_a_cost_of_one_stage_goes_before_that_of_all() -> None:
    costs = Costs({Op.FORWARD: 2.0, (1, Op.FORWARD): 5.0})
    texts = ("0F0", "1F0", "0B0", "0I0", "0W0")
    assert [costs.time_of(Action.parse(text)) for text in texts] == [2, 5, 2, 1, 1]


def test_the_slowest_stage_sets_the_pace() -> None:
    timeline = simulate(make_plan("1f1b", 4, 32), Costs({(2, Op.FORWARD): 3.0, (2, Op.BACKWARD): 6.0}))
    assert timeline.busy[2] == 32 * 9
    assert timeline.makespan == pytest.approx(2 * 1 + 32 * 9 + 2 * 2)


def test_splitting_backward_shortens_the_step() -> None:
    head = "schedule: mine\nmicrobatches: 2\nstage ranks: 0 1\n"
    whole = Plan.parse(head + "rank 0: 0F0 0F1 0B0 0B1\nrank 1: 1F0 1B0 1F1 1B1\n")
    split = Plan.parse(head + "rank 0: 0F0 0F1 0I0 0W0 0I1 0W1\nrank 1: 1F0 1I0 1F1 1I1 1W0 1W1\n")
    assert simulate(whole).makespan == 9
    assert simulate(split).makespan == 7


def test_one_rank_never_idles() -> None:
    assert simulate(make_plan("gpipe", 1, 7), Costs({Op.FORWARD: 0.1})).bubble_fraction == pytest.approx(0)


def test_work_that_takes_no_time_has_no_bubble() -> None:
    assert simulate(make_plan("gpipe", 2, 2), Costs({Op.FORWARD: 0.0, Op.BACKWARD: 0.0})).bubble_fraction == 0


def test_an_invalid_plan_is_not_simulated() -> None:
    plan = Plan.parse("schedule: mine\nmicrobatches: 1\nstage ranks: 0\nrank 0: 0B0 0F0\n")
    with pytest.raises(PlanError, match="No rank may wait for ever"):
        simulate(plan)


@pytest.mark.parametrize("times", [{Op.FORWARD: -1.0}, {(0, Op.BACKWARD): float("nan")}, {Op.FORWARD: float("inf")}])
def test_a_time_that_cannot_be_is_an_error(times: dict) -> None:
    with pytest.raises(ValueError, match="A time must be 0 or more, and finite"):
        Costs(times)


def test_a_negative_transfer_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Got -0\.5 for transfer"):
        Costs(transfer=-0.5)


def test_the_period_leaves_out_what_the_next_step_fills() -> None:
    timeline = simulate(make_plan("zb-v", 2, 4, 2))
    assert timeline.makespan == 4 * 2 * 3 + 1
    assert timeline.period == 4 * 2 * 3
    assert simulate(make_plan("1f1b", 2, 4)).period == simulate(make_plan("1f1b", 2, 4)).makespan


def test_costs_of_parts_make_the_same_work_of_a_rank() -> None:
    one = simulate(make_plan("gpipe", 2, 4, 1), Costs.of_parts(1))
    three = simulate(make_plan("gpipe", 2, 4, 3), Costs.of_parts(3))
    assert one.busy == pytest.approx(three.busy)
    assert one.makespan - one.busy[0] == pytest.approx(3 * (three.makespan - three.busy[0]))


def test_memory_of_whole_backwards_follows_the_live_activations() -> None:
    plan = make_plan("1f1b", 3, 6)
    memory = [StageMemory(activation=10.0, always=5.0)] * 3
    assert simulate(plan, memory=memory).peak_bytes == tuple(5 + 10 * live for live in (3, 2, 1))


def test_memory_of_a_split_backward_step_by_step() -> None:
    head = "schedule: mine\nmicrobatches: 2\nstage ranks: 0\n"
    plan = Plan.parse(head + "rank 0: 0F0 0I0 0F1 0W0 0B1\n")
    memory = [StageMemory(activation=72, kept_for_weights=12, made_for_weights=20, always=100)]
    timeline = simulate(plan, Costs({Op.BACKWARD: 3.0}), memory)
    assert timeline.memory_curve(0) == [
        (0, 100),  # before it begins
        *[(0, 172), (1, 172)],  # 0F0
        *[(1, 192), (2, 132)],  # 0I0: 20 made at its start, 60 let go of at its end
        *[(2, 204), (3, 204)],  # 0F1
        *[(3, 204), (4, 172)],  # 0W0
        *[(4, 172), (7, 100)],  # 0B1
    ]
    assert timeline.peak_bytes == (204,)


EACH_ONE = Costs(dict.fromkeys(Op, 1.0))


def test_values_on_their_way_take_space_on_both_sides() -> None:
    first = StageMemory(activation=10)
    last = StageMemory(activation=5, inputs=(3,), kept_inputs=(1,), input_gradients=(2,))
    timeline = simulate(make_plan("1f1b", 2, 2), EACH_ONE, [first, last])
    # 0F0 and its output; 0F1 and its output; a gradient, then 0B0; a gradient, then 0B1.
    assert [held for _, held in timeline.memory_curve(0)] == [0, 13, 10, 23, 20, 22, 22, 10, 12, 12, 0]
    # An input, then 1F0; the next input, before that has ended; 1B0 and its gradient; 1F1; 1B1 and its gradient.
    assert [held for _, held in timeline.memory_curve(1)] == [0, 3, 7, 10, 8, 10, 3, 7, 5, 7, 0]
    assert timeline.peak_bytes == (23, 10)


def test_a_slow_transfer_holds_what_it_moves() -> None:
    stages = [StageMemory(activation=10), StageMemory(activation=5, inputs=(3,), input_gradients=(2,))]
    costs = Costs(dict.fromkeys(Op, 1.0), transfer=2.0)
    timeline = simulate(make_plan("gpipe", 2, 1), costs, stages)
    assert timeline.memory_curve(0) == [(0, 0), (0, 13), (1, 13), (3, 10), (5, 12), (7, 12), (8, 0)]
    assert timeline.memory_curve(1) == [(0, 0), (1, 3), (3, 8), (4, 5), (4, 7), (5, 2), (7, 0)]


def test_a_value_that_stays_on_its_rank_is_there_once() -> None:
    stages = [StageMemory(activation=10), StageMemory(activation=5, inputs=(3,), input_gradients=(2,))]
    timeline = simulate(make_plan("gpipe", 1, 1, 2), EACH_ONE, stages)
    assert [held for _, held in timeline.memory_curve(0)] == [0, 13, 13, 18, 15, 17, 12, 12, 0]


def test_what_is_computed_again_is_there_while_backward_runs() -> None:
    head = "schedule: mine\nmicrobatches: 1\nstage ranks: 0\n"
    memory = [StageMemory(5, kept_for_weights=2, made_for_weights=8, recomputed=20, found_for_weights=6)]
    whole = simulate(Plan.parse(head + "rank 0: 0F0 0B0\n"), EACH_ONE, memory)
    assert [held for _, held in whole.memory_curve(0)] == [0, 5, 5, 25, 0]
    split = simulate(Plan.parse(head + "rank 0: 0F0 0I0 0W0\n"), EACH_ONE, memory)
    assert [held for _, held in split.memory_curve(0)] == [0, 5, 5, 27, 10, 10, 0]


def test_actions_that_take_no_time_take_space() -> None:
    timeline = simulate(make_plan("gpipe", 1, 2), Costs(dict.fromkeys(Op, 0.0)), [StageMemory(activation=10)])
    assert timeline.peak_bytes == (20,)
    assert timeline.memory_curve(0)[-1] == (0, 0)


def test_forwards_alone_keep_nothing() -> None:
    timeline = simulate(make_plan("inference", 2, 4), memory=[StageMemory(activation=10, always=3)] * 2)
    assert timeline.peak_bytes == (3, 3)


def test_memory_that_cannot_be_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"A number of bytes must be 0 or more, and finite. Got -1 for always."):
        StageMemory(activation=1, always=-1)
