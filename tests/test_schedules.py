"""The schedules: their grids as golden files, and their promises at random sizes."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshpipe.pipeline.plan import Action, Op, Plan
from meshpipe.pipeline.schedules import SCHEDULES, SEVERAL_STAGES, forward_only, make_plan
from meshpipe.pipeline.simulate import Costs, simulate
from meshpipe.pipeline.validate import validate

GOLDEN = Path(__file__).parent / "golden"
RANKS, MICROBATCHES, STAGES_PER_RANK = st.integers(1, 8), st.integers(1, 16), st.integers(1, 4)

sizes = settings(deadline=None, max_examples=40)
"""Random sizes, without a limit of time for each: a busy machine is no failure."""


def accepted_stages(name: str, stages_per_rank: int) -> int:
    return stages_per_rank if name in SEVERAL_STAGES else 1


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_a_plan_is_drawn_as_in_its_golden_file(path: Path) -> None:
    """The name of the file says what it draws: SCHEDULE_RANKSxMICROBATCHES or SCHEDULE_RANKSxMICROBATCHESxSTAGES."""
    name, sizes = path.stem.split("_")
    assert make_plan(name, *map(int, sizes.split("x"))).grid() == path.read_text()


def test_every_schedule_has_a_golden_file() -> None:
    assert {path.stem.split("_")[0] for path in GOLDEN.glob("*.txt")} == set(SCHEDULES)


@pytest.mark.parametrize("name", SCHEDULES)
@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES, stages_per_rank=STAGES_PER_RANK)
def test_every_plan_is_valid_and_whole(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    plan = make_plan(name, num_ranks, num_microbatches, accepted_stages(name, stages_per_rank))
    validate(plan)
    assert plan.schedule == name
    assert plan.num_ranks == num_ranks
    assert sorted(action for order in plan.orders for action in order) == sorted(
        Action(stage, op, microbatch)
        for stage in range(plan.num_stages)
        for op in (Op.FORWARD, Op.BACKWARD)
        for microbatch in range(num_microbatches)
    )
    assert Plan.parse(plan.to_text()) == plan


@pytest.mark.parametrize("name", SCHEDULES)
@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES, stages_per_rank=STAGES_PER_RANK)
def test_dependencies_hold_in_time(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    plan = make_plan(name, num_ranks, num_microbatches, accepted_stages(name, stages_per_rank))
    timeline = simulate(plan, Costs(transfer=0.5))
    for action, start in timeline.starts.items():
        for need in plan.dependencies(action):
            moved = plan.stage_ranks[need.stage] != plan.stage_ranks[action.stage]
            assert start >= timeline.ends[need] + (0.5 if moved else 0)


@pytest.mark.parametrize("name", SCHEDULES)
@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES, stages_per_rank=STAGES_PER_RANK)
def test_the_promised_peak_is_reached_and_not_passed(
    name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int
) -> None:
    plan = make_plan(name, num_ranks, num_microbatches, accepted_stages(name, stages_per_rank))
    assert simulate(plan).peak_activations == plan.peak_activations


@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES)
def test_peak_activations_are_those_of_the_papers(num_ranks: int, num_microbatches: int) -> None:
    gpipe, one_f_one_b = (make_plan(name, num_ranks, num_microbatches) for name in ("gpipe", "1f1b"))
    assert gpipe.peak_activations == (num_microbatches,) * num_ranks
    assert one_f_one_b.peak_activations == tuple(min(num_microbatches, num_ranks - rank) for rank in range(num_ranks))


@pytest.mark.parametrize("name", SCHEDULES)
@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES, forward=st.floats(0.1, 10.0), backward=st.floats(0.1, 10.0))
def test_the_bubble_is_that_of_the_formula(
    name: str, num_ranks: int, num_microbatches: int, forward: float, backward: float
) -> None:
    timeline = simulate(
        make_plan(name, num_ranks, num_microbatches), Costs({Op.FORWARD: forward, Op.BACKWARD: backward})
    )
    assert timeline.bubble_fraction == pytest.approx((num_ranks - 1) / (num_microbatches + num_ranks - 1))


@sizes
@given(num_ranks=RANKS, more=st.integers(0, 8), stages_per_rank=STAGES_PER_RANK)
def test_the_bubble_of_gpipe_shrinks_with_stages_per_rank(num_ranks: int, more: int, stages_per_rank: int) -> None:
    num_microbatches = num_ranks + more
    timeline = simulate(make_plan("gpipe", num_ranks, num_microbatches, stages_per_rank))
    expected = (num_ranks - 1) / (stages_per_rank * num_microbatches + num_ranks - 1)
    assert timeline.bubble_fraction == pytest.approx(expected)


@sizes
@given(num_ranks=RANKS, num_microbatches=MICROBATCHES, stages_per_rank=STAGES_PER_RANK)
def test_forward_only_holds_nothing(num_ranks: int, num_microbatches: int, stages_per_rank: int) -> None:
    plan = forward_only(num_ranks, num_microbatches, stages_per_rank)
    validate(plan)
    assert plan.forward_only
    assert len(plan.actions) == plan.num_stages * num_microbatches
    assert simulate(plan).peak_activations == (0,) * num_ranks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1bb", 2, 4), "The schedule must be one of gpipe, 1f1b. Got '1f1bb'. Did you mean 1f1b?"),
        (("GPipe", 2, 4), "The schedule must be one of gpipe, 1f1b. Got 'GPipe'. Did you mean gpipe?"),
        (("fastest", 2, 4), "The schedule must be one of gpipe, 1f1b. Got 'fastest'."),
        (("gpipe", 0, 4), "A plan needs at least 1 of its ranks. Got 0."),
        (("1f1b", 2, 0), "A plan needs at least 1 of its microbatches. Got 0."),
        (("gpipe", 2, 4, -1), "A plan needs at least 1 of its stages per rank. Got -1."),
        (
            ("1f1b", 2, 4, 2),
            "The schedule 1f1b takes one stage per rank. Got 2. Take one, or a schedule that takes several: gpipe.",
        ),
    ],
)
def test_sizes_and_names_that_do_not_fit_are_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_plan(*arguments)
