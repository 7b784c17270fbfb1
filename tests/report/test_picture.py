"""Pictures of timelines, with and without memory."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from meshpipe.plan.plan import Plan
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.simulate import Costs, StageMemory, simulate
from meshpipe.report.picture import Panel, check_picture, draw_timelines


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_of_timelines(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"plan.{suffix}"
    check_picture(file)
    plan = make_plan("gpipe", 2, 3, 2)
    predicted = simulate(plan, Costs.of_parts(2), [StageMemory(activation=1e6)] * 4)
    measured = simulate(plan, Costs(transfer=0.1))
    draw_timelines([Panel(predicted, "predicted"), Panel(measured, "measured", in_seconds=True)], file)
    assert file.stat().st_size > 1000
    if suffix == "svg":
        text = file.read_text()
        assert "forwards of all layers of a rank" in text or text.count("<g id=") > 40


def test_a_picture_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="suffix"):
        check_picture(tmp_path / "plan.doc")
    with pytest.raises(ValueError, match="folder"):
        check_picture(tmp_path / "missing" / "plan.png")


@pytest.mark.parametrize(("name", "sizes"), [("1f1b", (4, 8, 1)), ("interleaved-1f1b", (4, 8, 2)), ("zb-v", (4, 8, 2))])
def test_every_action_has_its_microbatch_and_every_stage_of_a_rank_its_shade(
    tmp_path: Path, name: str, sizes: tuple[int, int, int]
) -> None:
    drawn = parts_of(make_plan(name, *sizes), tmp_path)
    actions = list(make_plan(name, *sizes).actions)
    assert sorted(drawn.labels) == sorted(str(action.microbatch) for action in actions)
    kinds = {(action.op, action.stage // sizes[0]) for action in actions}
    assert len(drawn.colours) == len(kinds) == len({op for op, _ in kinds}) * sizes[2]


@pytest.mark.slow
def test_a_picture_with_no_room_for_labels_has_none_and_is_no_wider_than_a_screen(tmp_path: Path) -> None:
    drawn = parts_of(make_plan("interleaved-1f1b", 8, 128, 4), tmp_path)
    assert drawn.labels == []
    assert drawn.width <= 24


@dataclass
class Drawn:
    labels: list[str]
    colours: set[tuple[float, ...]]
    width: float


def parts_of(plan: Plan, folder: Path) -> Drawn:
    """What a picture of a plan shows, read from the figure as it is saved."""
    found: list[Drawn] = []

    class Kept(Figure):
        def savefig(self, file: Path, **_: object) -> None:
            file.touch()
            rows = self.axes[0]
            colours = {bar.get_facecolor() for bar in rows.patches}
            found.append(Drawn([text.get_text() for text in rows.texts], colours, self.get_figwidth()))

    stages = plan.num_stages // plan.num_ranks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure", Kept)
        draw_timelines([Panel(simulate(plan, Costs.of_parts(stages)), plan.schedule)], folder / "plan.png")
    return found[0]
