"""The text form of plans, their grid, and the rules of `validate`, as broken plans with the message they get."""

import subprocess
import sys
from pathlib import Path

import pytest

import meshpipe.plan.plan as plan_module
from meshpipe.plan.plan import Action, Op, Plan, PlanError
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.validate import MESSAGE_WIDTH, validate

TEXT = """\
schedule: mine
microbatches: 2
stage ranks: 0 1
peak activations: 2 1
rank 0: 0F0 0F1 0B0 0B1
rank 1: 1F0 1B0 1F1 1I1 1W1
"""


def plan_of(*rows: str, stage_ranks: str = "0 1", microbatches: int = 2, extra: str = "") -> Plan:
    ranks = "".join(f"rank {rank}: {row}\n" for rank, row in enumerate(rows))
    return Plan.parse(f"schedule: mine\nmicrobatches: {microbatches}\nstage ranks: {stage_ranks}\n{extra}{ranks}")


def error_of(plan: Plan) -> str:
    with pytest.raises(PlanError) as caught:
        validate(plan)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("2F0", Action(2, Op.FORWARD, 0)),
        ("0B13", Action(0, Op.BACKWARD, 13)),
        ("10I7", Action(10, Op.BACKWARD_INPUT, 7)),
        ("3W2", Action(3, Op.BACKWARD_WEIGHT, 2)),
    ],
)
def test_an_action_prints_and_parses(text: str, action: Action) -> None:
    assert str(action) == text
    assert Action.parse(text) == action


@pytest.mark.parametrize("text", ["", "2F", "F0", "2X0", "2f0", "2F0 ", "-1F0", "2F0F", "1F٣"])
def test_a_malformed_action_is_an_error(text: str) -> None:
    with pytest.raises(PlanError, match="An action is a stage, one of the letters F, B, I, W and a microbatch"):
        Action.parse(text)


def test_a_plan_prints_and_parses() -> None:
    plan = Plan.parse(TEXT)
    assert plan.to_text() == TEXT
    assert (plan.schedule, plan.num_ranks, plan.num_stages, plan.num_microbatches) == ("mine", 2, 2, 2)
    assert plan.peak_activations == (2, 1)
    assert plan.stages_of(1) == (1,)
    validate(plan)


def test_parsing_skips_comments_and_blank_lines() -> None:
    assert Plan.parse("# mine\n\n" + TEXT.replace("0B1\n", "0B1  # last\n")) == Plan.parse(TEXT)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rank 1:", "rank 2:", "Got 'rank 2: 1F0 1B0 1F1 1I1 1W1' on line 6."),
        ("rank 1:", "rank 0:", "on line 6."),
        ("schedule: mine\n", "", "Add 'schedule'."),
        ("stage ranks: 0 1\n", "", "Add 'stage ranks'."),
        ("schedule: mine", "scheduler: mine", "Got 'scheduler: mine' on line 1."),
        ("microbatches: 2", "microbatches: 2\nmicrobatches: 2", "on line 3."),
        ("microbatches: 2", "microbatches: two", "`microbatches` of a plan must be one whole number. Got 'two'."),
        ("microbatches: 2", "microbatches: 2 3", "`microbatches` of a plan must be one whole number. Got '2 3'."),
        ("ranks: 0 1", "ranks: 0,1", "`stage ranks` of a plan must be whole numbers with spaces between them."),
        ("1F1", "1X1", "Line 6 of the plan: An action is"),
        (TEXT, "", "needs the lines schedule, microbatches and stage ranks"),
    ],
)
def test_malformed_text_is_an_error_that_says_where(old: str, new: str, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(TEXT.replace(old, new))
    assert message in str(caught.value)


def test_grid_puts_every_action_at_its_time() -> None:
    assert Plan.parse(TEXT).grid() == (
        "rank 0  0F0  0F1  .    0B0  .    0B1\n"  #
        "rank 1  .    1F0  1B0  1F1  1I1  1W1\n"
    )


def test_grid_marks_an_action() -> None:
    assert Plan.parse(TEXT).grid(mark=Action.parse("1B0")) == (
        "rank 0  0F0  0F1  .    0B0  .    0B1\n"  #
        "rank 1  .    1F0 [1B0] 1F1  1I1  1W1   <-- here\n"
    )


def test_a_narrow_grid_is_cut_around_the_mark() -> None:
    plan = plan_of(" ".join(f"0{op}{m}" for op in "FB" for m in range(9)), stage_ranks="0", microbatches=9)
    assert plan.grid(Action.parse("0B0"), width=48) == "rank 0 ...  0F7  0F8 [0B0] 0B1  0B2  ...  <-- here\n"
    assert plan.grid(Action.parse("0B0"), width=1) == "rank 0 ... [0B0] ...  <-- here\n"
    assert plan.grid(width=48) == "rank 0  0F0  0F1  0F2  0F3  0F4  ...\n"


VALID = {
    "two orders that interleave": plan_of("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"),
    "split backward, weights last": plan_of("0F0 0F1 0I0 0I1 0W0 0W1", "1F0 1I0 1F1 1I1 1W0 1W1"),
    "some split, some whole": plan_of("0F0 0F1 0B0 0I1 0W1", "1F0 1I0 1F1 1B1 1W0".replace("1B1 1W0", "1W0 1B1")),
    "forwards alone": plan_of("0F0 0F1", "1F0 1F1"),
    "two stages on a rank": plan_of("0F0 1F0 1B0 0B0", stage_ranks="0 0", microbatches=1),
    "there and back": plan_of("0F0 3F0 3B0 0B0", "1F0 2F0 2B0 1B0", stage_ranks="0 1 1 0", microbatches=1),
}


@pytest.mark.parametrize("plan", VALID.values(), ids=VALID.keys())
def test_a_valid_plan_passes(plan: Plan) -> None:
    validate(plan)
    assert Plan.parse(plan.to_text()) == plan


INVALID = {
    "no microbatches": (
        plan_of("", "", microbatches=0),
        """\
A plan needs at least one microbatch and one stage. Got 0 microbatches and 2 stages. Correct the header.
rank 0
rank 1
""",
    ),
    "a rank without a stage": (
        plan_of("0F0 0B0", "", stage_ranks="0", microbatches=1),
        """\
Every stage must be on one of the ranks 0 to 1, and every rank hold a stage. Got stage ranks 0. \
Change `stage ranks`, or add or remove ranks.
rank 0  0F0  0B0
rank 1  .    .
""",
    ),
    "a stage on no rank": (
        plan_of("0F0 0B0", stage_ranks="0 1", microbatches=1),
        """\
Every stage must be on one of the ranks 0 to 0, and every rank hold a stage. Got stage ranks 0 1. \
Change `stage ranks`, or add or remove ranks.
rank 0  0F0  0B0
""",
    ),
    "a promise too few": (
        plan_of("0F0 0B0", "1F0 1B0", microbatches=1, extra="peak activations: 1\n"),
        """\
`peak activations` must have one count for each rank. Got 1 counts for 2 ranks. Correct or remove it.
rank 0  0F0  0B0
rank 1  1F0  1B0
""",
    ),
    "an unknown microbatch": (
        plan_of("0F0 0F1 0F2 0B0 0B1", "1F0 1F1 1B0 1B1"),
        """\
Stages go from 0 to 1 and microbatches from 0 to 1. Got 0F2 on rank 0. Remove it, or raise the sizes in the header.
rank 0  0F0  0F1 [0F2] 0B0  0B1   <-- here
rank 1  1F0  1F1  1B0  1B1  .
""",
    ),
    "the wrong rank": (
        plan_of("0F0 0F1 0B0 1B1 0B1", "1F0 1F1 1B0"),
        """\
An action must be on the rank that holds its stage. Got 1B1 on rank 0, with stage 1 on rank 1. \
Move it to rank 1, or change `stage ranks`.
rank 0  0F0  0F1  0B0 [1B1] 0B1   <-- here
rank 1  1F0  1F1  1B0  .    .
""",
    ),
    "twice": (
        plan_of("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1F1 1B1"),
        """\
Every action must appear once. Got 1F1 again on rank 1, as number 4 of its order after number 2. \
Remove one of the two.
rank 0  0F0  0F1  0B0  0B1  .
rank 1  1F0  1F1  1B0 [1F1] 1B1   <-- here
""",
    ),
    "a backward missing": (
        plan_of("0F0 0F1 0B0 0B1", "1F0 1B0 1F1"),
        """\
Every stage needs, for each microbatch, an F and either a B or both an I and a W; or, in a plan of forwards alone, \
an F. Got 1F1 for stage 1 and microbatch 1. Complete it on rank 1.
rank 0  0F0  0F1  0B0  0B1
rank 1  1F0  1B0 [1F1] .     <-- here
""",
    ),
    "half a split backward": (
        plan_of("0F0 0I0", stage_ranks="0", microbatches=1),
        """\
Every stage needs, for each microbatch, an F and either a B or both an I and a W; or, in a plan of forwards alone, \
an F. Got 0F0 0I0 for stage 0 and microbatch 0. Complete it on rank 0.
rank 0  0F0 [0I0]  <-- here
""",
    ),
    "nothing of a microbatch": (
        plan_of("0F0 0B0", stage_ranks="0"),
        """\
Every stage needs, for each microbatch, an F and either a B or both an I and a W; or, in a plan of forwards alone, \
an F. Got nothing for stage 0 and microbatch 1. Complete it on rank 0.
rank 0  0F0  0B0
""",
    ),
    "forwards out of order": (
        plan_of("0F1 0F0 0B0 0B1", "1F0 1F1 1B0 1B1"),
        """\
The forwards of a stage must go in the order of the microbatches, so that state and sums of gradients do not depend \
on the schedule. Got 0F0 after 0F1 on rank 0. Exchange the two.
rank 0  0F1 [0F0] 0B0  0B1   <-- here
rank 1  1F0  1F1  1B0  1B1
""",
    ),
    "gradients out of order": (
        plan_of("0F0 0F1 0B0 0B1", "1F0 1F1 1I0 1B1 1W0"),
        """\
The gradients (B or W) of a stage must go in the order of the microbatches, so that state and sums of gradients do \
not depend on the schedule. Got 1W0 after 1B1 on rank 1. Exchange the two.
rank 0  0F0  0F1  0B0  0B1  .
rank 1  1F0  1F1  1I0  1B1 [1W0]  <-- here
""",
    ),
    "a circle of two ranks": (
        plan_of("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1"),
        """\
No rank may wait for ever. Got a circle: 0B0 on rank 0 waits for 1B0 on rank 1, which comes after 1F1; \
1F1 on rank 1 waits for 0F1 on rank 0, which comes after 0B0. Move an action so that each comes after what it waits for.
rank 0  0F0  .   [0B0] 0F1  0B1   <-- here
rank 1  .    1F0  1F1  1B0  1B1
""",
    ),
    "a circle within a rank": (
        plan_of("0F0 0W0 0I0", stage_ranks="0", microbatches=1),
        """\
No rank may wait for ever. Got a circle: 0W0 on rank 0 waits for 0I0 on rank 0, which comes after 0W0. \
Move an action so that each comes after what it waits for.
rank 0  0F0 [0W0] 0I0   <-- here
""",
    ),
    "a promise broken": (
        plan_of("0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1", extra="peak activations: 2 1\n"),
        """\
Rank 1 must not hold more activations at once than the 1 of `peak activations`. Got 2 in 1F1. \
Move a backward before it, or raise that number.
rank 0  0F0  0F1  .    .    0B0  0B1
rank 1  .    1F0 [1F1] 1B0  1B1  .     <-- here
""",
    ),
}


@pytest.mark.parametrize(("plan", "message"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_plan_is_drawn(plan: Plan, message: str) -> None:
    assert error_of(plan) == message


def test_a_negative_stage_is_no_stage() -> None:
    plan = Plan("mine", 1, (0,), ((Action(0, Op.FORWARD, 0), Action(-1, Op.FORWARD, 0)),))
    assert "Got -1F0 on rank 0" in error_of(plan)


def test_the_circle_leaves_out_ranks_that_only_wait_for_it() -> None:
    plan = plan_of("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1", "2F0 2F1 2B0 2B1", stage_ranks="0 1 2")
    message = error_of(plan)
    assert "1B0 on rank 1 waits for 2B0 on rank 2, which comes after 2F1" in message
    assert "rank 0 waits" not in message


def test_a_long_plan_is_drawn_only_around_the_mistake() -> None:
    microbatches = 200
    order = [f"0{op}{microbatch}" for op in "FB" for microbatch in range(microbatches)]
    order[300], order[301] = order[301], order[300]
    message = error_of(plan_of(" ".join(order), stage_ranks="0", microbatches=microbatches))
    drawing = message.splitlines()[-1]
    assert "[0B100]" in drawing
    assert len(drawing) <= MESSAGE_WIDTH


def test_activations_are_held_until_the_last_backward_that_needs_them() -> None:
    assert plan_of("0F0 0I0 0F1 0W0 0B1", stage_ranks="0").live_activations(0) == [1, 1, 2, 2, 1]
    assert plan_of("0F0 0F1", stage_ranks="0").live_activations(0) == [0, 0]


def test_plans_and_programs_need_no_jax() -> None:
    # The package itself offers names that need JAX; its modules are looked up without running its __init__.
    code = f"""
import sys, types
package = types.ModuleType("meshpipe")
package.__path__ = [{str(Path(plan_module.__file__).parents[1])!r}]
sys.modules["meshpipe"] = package
import meshpipe.plan.validate, meshpipe.plan.schedules, meshpipe.plan.simulate, meshpipe.plan.lower
assert not {{"jax", "jaxlib", "flax", "numpy"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("schedule", "microbatches", "fusible"),
    [("1f1b", 8, True), ("gpipe", 1, True), ("gpipe", 2, False), ("zb-h1", 8, False), ("inference", 8, False)],
)
def test_the_last_stage_can_be_fused_where_backwards_follow_their_forwards(
    schedule: str, microbatches: int, fusible: bool
) -> None:
    assert make_plan(schedule, 4, microbatches).fusible_stage == (3 if fusible else None)


def test_the_grid_comes_in_pages_as_wide_as_the_terminal() -> None:
    plan = make_plan("1f1b", 4, 32)
    whole = [line.split()[2:] for line in plan.grid().splitlines()]
    for width in (40, 80, 120):
        pages = list(plan.pages(width))
        assert max(len(line) for page in pages for line in page.splitlines()) <= width
        rows: list[list[str]] = [[] for _ in range(4)]
        for page in pages:
            for row, line in zip(rows, page.splitlines(), strict=True):
                row += [cell for cell in line.split()[2:] if cell != "..."]
        assert rows == whole
    assert list(plan.pages(2000)) == [plan.grid()]


def test_a_plan_is_a_line_and_in_a_notebook_a_table() -> None:
    plan = Plan.parse(TEXT)
    assert repr(plan) == f"Plan({plan.schedule}, ranks=2, stages=2, microbatches=2, actions=9)"
    html = plan._repr_html_()
    assert html.count("<tr>") == 2
    assert "<td>1B0</td>" in html
