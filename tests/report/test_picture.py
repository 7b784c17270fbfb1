"""Pictures of timelines, with and without memory."""

from pathlib import Path

import pytest

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
