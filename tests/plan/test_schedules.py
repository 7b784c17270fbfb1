"""The schedules: their grids as golden files, and their promises and formulas at all kinds of sizes."""

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.schedules import SCHEDULES, STAGES_PER_RANK, forwards_of, inference, make_plan, takes_stages
from meshpipe.plan.simulate import Costs, Timeline, simulate
from meshpipe.plan.validate import validate

GOLDEN = Path(__file__).parent / "golden"
RANKS, MICROBATCHES, STAGES = st.integers(1, 8), st.integers(1, 32), st.integers(1, 4)
TRAINING = [name for name in SCHEDULES if name != "inference"]
V_SHAPED = ("zb-v", "dualpipe-v")
LOOPED = ("gpipe", "interleaved-1f1b", "looped-bfs", "inference")

sizes = settings(max_examples=25)
"""Random sizes, without a limit of time for each: a busy machine is no failure."""


def accepted_stages(name: str, stages_per_rank: int) -> int:
    """That number of stages per rank if the schedule takes it, or another that it takes."""
    return stages_per_rank if takes_stages(name, stages_per_rank) else 2 if takes_stages(name, 2) else 1


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_a_plan_is_drawn_as_in_its_golden_file(path: Path) -> None:
    """The name of the file says what it draws: SCHEDULE_RANKSxMICROBATCHES or SCHEDULE_RANKSxMICROBATCHESxSTAGES."""
    name, sizes = path.stem.split("_")
    assert make_plan(name, *map(int, sizes.split("x"))).grid() == path.read_text()


def test_every_schedule_has_golden_files() -> None:
    drawn = [path.stem.split("_")[0] for path in GOLDEN.glob("*.txt")]
    assert all(drawn.count(name) >= 2 for name in SCHEDULES)
    assert set(drawn) == set(SCHEDULES)


def check_promises(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    """Valid, whole, printed and parsed, and holding exactly as much as promised."""
    plan = make_plan(name, num_ranks, num_microbatches, stages_per_rank)
    validate(plan)
    assert (plan.schedule, plan.num_ranks, plan.num_microbatches) == (name, num_ranks, num_microbatches)
    assert plan.num_stages == num_ranks * stages_per_rank
    forwards = [action for order in plan.orders for action in order if action.op is Op.FORWARD]
    ends = [action for order in plan.orders for action in order if action.op.accumulates]
    cells = set(itertools.product(range(plan.num_stages), range(num_microbatches)))
    assert {(action.stage, action.microbatch) for action in forwards} == cells
    assert len(forwards) == len(cells)
    assert {(action.stage, action.microbatch) for action in ends} == (set() if name == "inference" else cells)
    assert Plan.parse(plan.to_text()) == plan
    assert simulate(plan).peak_activations == plan.peak_activations


@pytest.mark.parametrize("name", SCHEDULES)
@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES, stages_per_rank=STAGES)
def test_every_plan_keeps_its_promises(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    check_promises(name, num_ranks, num_microbatches, accepted_stages(name, stages_per_rank))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_plan_of_all_small_sizes_keeps_its_promises(name: str) -> None:
    for num_ranks, num_microbatches, stages_per_rank in itertools.product(range(1, 9), range(1, 33), range(1, 5)):
        if takes_stages(name, stages_per_rank):
            check_promises(name, num_ranks, num_microbatches, stages_per_rank)
            if name != "inference":
                check_bubble(name, num_ranks, num_microbatches, stages_per_rank)


@pytest.mark.parametrize("name", SCHEDULES)
@sizes
@given(num_ranks=RANKS, num_microbatches=st.integers(1, 12), stages_per_rank=STAGES)
def test_dependencies_hold_in_time(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    plan = make_plan(name, num_ranks, num_microbatches, accepted_stages(name, stages_per_rank))
    timeline = simulate(plan, Costs(transfer=0.5))
    for action, start in timeline.starts.items():
        for need in plan.dependencies(action):
            moved = plan.stage_ranks[need.stage] != plan.stage_ranks[action.stage]
            assert start >= timeline.ends[need] + (0.5 if moved else 0)


def idle(timeline: Timeline) -> float:
    """Time that a step alone takes longer than its work, where all ranks have the same."""
    return timeline.makespan - max(timeline.busy)


def idle_between_steps(timeline: Timeline) -> float:
    """The same of a step among others."""
    return timeline.period - max(timeline.busy)


def expected_idle(name: str, ranks: int, microbatches: int, stages_per_rank: int) -> tuple[float, float]:
    """The formulas of the docstrings with F = I = W = 1 and B = 2, of a step alone and of one among others."""
    missing = max(0, ranks - microbatches)
    if name in ("zb-h1",):
        return (ranks - 1 + missing,) * 2
    if name == "zb-h2":
        between = max(0, 2 * ranks - 1 - microbatches)
        return max(simulate(make_plan("zb-h1", ranks, microbatches)).makespan - 3 * microbatches, between), between
    if name == "zb-v":
        between = 2 * max(0, 2 * ranks - 1 - microbatches)
        return max(ranks - 1, between), between
    if name == "dualpipe-v":
        return (ranks - 1,) * 2
    more = 3 * (stages_per_rank - 1) * missing if name in LOOPED else 0
    return (3 * (ranks - 1) + more,) * 2


def check_bubble(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    if name == "dualpipe-v" and num_microbatches < 2 * num_ranks:
        return  # its docstring gives no formula
    timeline = simulate(make_plan(name, num_ranks, num_microbatches, stages_per_rank))
    alone, between = expected_idle(name, num_ranks, num_microbatches, stages_per_rank)
    assert idle_between_steps(timeline) == pytest.approx(between)
    if name == "zb-h2" and num_microbatches < 2 * num_ranks - 1:
        assert idle(timeline) >= alone
    else:
        assert idle(timeline) == pytest.approx(alone)
    fraction = alone / (3 * stages_per_rank * num_microbatches + alone)
    if name != "zb-h2":
        assert timeline.bubble_fraction == pytest.approx(fraction)


@pytest.mark.parametrize("name", TRAINING)
@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES, stages_per_rank=STAGES)
def test_the_bubble_is_that_of_the_formula(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int
) -> None:
    check_bubble(name, num_ranks, num_microbatches, accepted_stages(name, stages_per_rank))


@pytest.mark.parametrize("name", [name for name in TRAINING if not name.startswith("zb") and name != "dualpipe-v"])
@sizes
@given(
    num_ranks=RANKS,
    more=st.integers(0, 8),
    stages_per_rank=STAGES,
    forward=st.floats(0.1, 10.0),
    backward=st.floats(0.1, 10.0),
)
def test_the_bubble_of_whole_backwards_is_a_fraction_whatever_their_cost(
    name: str, num_ranks: int, more: int, stages_per_rank: int, forward: float, backward: float
) -> None:
    num_microbatches, stages_per_rank = num_ranks + more, accepted_stages(name, stages_per_rank)
    plan = make_plan(name, num_ranks, num_microbatches, stages_per_rank)
    timeline = simulate(plan, Costs({Op.FORWARD: forward, Op.BACKWARD: backward}))
    expected = (num_ranks - 1) / (stages_per_rank * num_microbatches + num_ranks - 1)
    assert timeline.bubble_fraction == pytest.approx(expected)


@sizes
@given(
    num_ranks=RANKS,
    num_microbatches=MICROBATCHES,
    weight=st.floats(0.2, 1.0),
    forward=st.floats(1.0, 2.0),
    backward_input=st.floats(1.0, 2.0),
)
def test_the_bubble_of_zb_h1_for_any_times(
    num_ranks: int, num_microbatches: int, weight: float, forward: float, backward_input: float
) -> None:
    costs = Costs({Op.FORWARD: forward, Op.BACKWARD_INPUT: backward_input, Op.BACKWARD_WEIGHT: weight})
    timeline = simulate(make_plan("zb-h1", num_ranks, num_microbatches), costs)
    missing = max(0, num_ranks - num_microbatches)
    expected = (num_ranks - 1) * (forward + backward_input - weight) + missing * weight
    assert idle(timeline) == pytest.approx(expected)


@sizes
@given(num_ranks=RANKS, more=st.integers(0, 16), backward_input=st.floats(1.0, 2.0), weight=st.floats(0.5, 1.0))
def test_the_bubble_of_zb_h2_between_steps_for_any_times(
    num_ranks: int, more: int, backward_input: float, weight: float
) -> None:
    costs = Costs({Op.BACKWARD_INPUT: backward_input, Op.BACKWARD_WEIGHT: weight})
    timeline = simulate(make_plan("zb-h2", num_ranks, 2 * num_ranks - 1 + more), costs)
    expected = (num_ranks - 1) * max(0.0, 1 + backward_input - 2 * weight)
    assert idle_between_steps(timeline) == pytest.approx(expected, abs=1e-9)


@sizes
@given(num_ranks=RANKS, more=st.integers(0, 16), backward_input=st.floats(0.5, 2.0), weight=st.floats(0.5, 1.0))
def test_the_bubble_of_dualpipe_v_is_at_most_that_of_its_source(
    num_ranks: int, more: int, backward_input: float, weight: float
) -> None:
    backward = backward_input + weight
    costs = Costs({Op.BACKWARD: backward, Op.BACKWARD_INPUT: backward_input, Op.BACKWARD_WEIGHT: weight})
    timeline = simulate(make_plan("dualpipe-v", num_ranks, 2 * num_ranks + more), costs)
    assert idle(timeline) <= (num_ranks - 1) * (1 + 2 * backward - 3 * weight) + 1e-9


@sizes
@given(num_ranks=st.integers(2, 8), transfer=st.floats(0.01, 1.5))
def test_transfers_hold_up_1f1b_and_not_the_eager_one(num_ranks: int, transfer: float) -> None:
    def time_of_another_round(name: str) -> float:
        few, many = 8 * num_ranks, 9 * num_ranks
        costs = Costs(transfer=transfer)
        return (
            simulate(make_plan(name, num_ranks, many), costs).makespan
            - simulate(make_plan(name, num_ranks, few), costs).makespan
        )

    assert time_of_another_round("1f1b") == pytest.approx(3 * num_ranks + 2 * transfer * (num_ranks - 1))
    assert time_of_another_round("eager-1f1b") == pytest.approx(3 * num_ranks)


@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES)
def test_peak_activations_are_those_of_the_papers(num_ranks: int, num_microbatches: int) -> None:
    peaks = {name: make_plan(name, num_ranks, num_microbatches).peak_activations for name in SCHEDULES}
    assert peaks["gpipe"] == (num_microbatches,) * num_ranks
    assert peaks["1f1b"] == tuple(min(num_microbatches, num_ranks - rank) for rank in range(num_ranks))
    assert peaks["zb-h1"] == (peaks["1f1b"][0],) * num_ranks
    assert (
        peaks["zb-h2"]
        == (peaks["eager-1f1b"][0],) * num_ranks
        == (min(num_microbatches, 2 * num_ranks - 1),) * num_ranks
    )
    assert max(peaks["zb-v"]) <= 2 * num_ranks  # of half a rank's layers each: no more than 1f1b
    assert peaks["inference"] == (0,) * num_ranks


@pytest.mark.parametrize("name", V_SHAPED)
def test_stages_of_a_v_turn_at_the_last_rank(name: str) -> None:
    plan = make_plan(name, 4, 8)
    assert plan.stage_ranks == (0, 1, 2, 3, 3, 2, 1, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_a_number_of_stages_the_schedule_takes_its_fewest(name: str) -> None:
    plan = make_plan(name, 3, 6)
    assert plan.num_stages == 3 * accepted_stages(name, 1)
    assert plan == SCHEDULES[name](3, 6) == make_plan(name, 3, 6, accepted_stages(name, 1))


@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES, stages_per_rank=STAGES)
def test_forward_only_holds_nothing(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    plan = inference(num_ranks, num_microbatches, stages_per_rank)
    validate(plan)
    assert plan.forward_only
    assert len(plan.actions) == plan.num_stages * num_microbatches
    assert simulate(plan).peak_activations == (0,) * num_ranks


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_forwards_of_a_plan_are_a_plan_on_its_ranks(name: str) -> None:
    trained = make_plan(name, 4, 8)
    plan = forwards_of(trained)
    validate(plan)
    assert plan.forward_only
    assert plan.stage_ranks == trained.stage_ranks
    assert len(plan.actions) == plan.num_stages * 8
    few = forwards_of(trained, 3)
    validate(few)
    assert {action for action in plan.actions if action.microbatch < 3} == set(few.actions)


ALL = "gpipe, looped-bfs, inference, dualpipe-v, 1f1b, eager-1f1b, interleaved-1f1b, zb-h1, zb-h2, zb-v"
ONE = "gpipe, 1f1b, eager-1f1b, zb-h1, zb-h2"
KNOWN = f"The schedule must be one of {ALL}, a file of a plan that ends in .txt, or auto to train."


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1bb", 2, 4), f"{KNOWN} Got '1f1bb'. Did you mean 1f1b?"),
        (("GPipe", 2, 4), f"{KNOWN} Got 'GPipe'. Did you mean gpipe?"),
        (("zbv", 2, 4), f"{KNOWN} Got 'zbv'. Did you mean zb-v?"),
        (("fastest", 2, 4), f"{KNOWN} Got 'fastest'."),
        (("gpipe", 0, 4), "A plan needs at least 1 of its ranks. Got 0."),
        (("1f1b", 2, 0), "A plan needs at least 1 of its microbatches. Got 0."),
        (("gpipe", 2, 4, -1), "A plan needs at least 1 of its stages per rank. Got -1."),
        (
            ("1f1b", 2, 4, 2),
            "The schedule 1f1b takes one stage per rank. Got 2. Take one, or a schedule that takes several: "
            "gpipe, looped-bfs, dualpipe-v, interleaved-1f1b, zb-v.",
        ),
        (
            ("zb-v", 2, 4, 3),
            "The schedule zb-v takes two stages per rank. Got 3. Take two, or a schedule that takes several: "
            "gpipe, looped-bfs, interleaved-1f1b.",
        ),
        (
            ("zb-v", 2, 4, 1),
            f"The schedule zb-v takes two stages per rank. Got 1. Take two, or a schedule that takes one: {ONE}.",
        ),
        (
            ("interleaved-1f1b", 2, 4, 1),
            "The schedule interleaved-1f1b takes at least two stages per rank. Got 1. Take two or more, "
            f"or a schedule that takes one: {ONE}.",
        ),
    ],
)
def test_sizes_and_names_that_do_not_fit_are_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_plan(*arguments)


def test_the_schedules_of_several_stages_are_named() -> None:
    several = {name for name, (_, most) in STAGES_PER_RANK.items() if most != 1}
    assert several == {"gpipe", "interleaved-1f1b", "looped-bfs", "zb-v", "dualpipe-v", "inference"}
