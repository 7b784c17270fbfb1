"""Plans of one's own, read from files."""

import re
from pathlib import Path

import pytest

from meshpipe.plan.plan import Plan, PlanError
from meshpipe.plan.schedules import make_plan


def write(folder: Path, plan: Plan | str) -> str:
    file = folder / "mine.txt"
    file.write_text(plan if isinstance(plan, str) else plan.to_text())
    return str(file)


@pytest.mark.parametrize("name", ["1f1b", "zb-v", "dualpipe-v"])
def test_a_plan_that_was_written_is_read(tmp_path: Path, name: str) -> None:
    plan = make_plan(name, 3, 8)
    file = write(tmp_path, plan)
    assert make_plan(file, 3, 8) == plan
    assert make_plan(file, 3, 8, plan.num_stages // 3) == plan


def test_a_plan_that_breaks_a_rule_is_drawn(tmp_path: Path) -> None:
    file = write(tmp_path, make_plan("1f1b", 2, 2).to_text().replace("1F0 1B0", "1B0 1F0"))
    with pytest.raises(PlanError) as caught:
        make_plan(file, 2, 2)
    assert str(caught.value).startswith(f"{file}: No rank may wait for ever.")
    assert "[1B0]" in str(caught.value)


def test_malformed_text_names_the_file_and_line(tmp_path: Path) -> None:
    file = write(tmp_path, make_plan("1f1b", 2, 2).to_text().replace("1B0", "1X0"))
    with pytest.raises(PlanError, match=re.escape(f"{file}: Line 6 of the plan: An action is")):
        make_plan(file, 2, 2)


@pytest.mark.parametrize(
    ("sizes", "got"),
    [
        ((3, 4), "Got 2 ranks in {file}, and 3 on the mesh."),
        ((2, 5), "Got 4 microbatches in {file}, and 5 asked for."),
        ((2, 4, 2), "Got 2 stages in {file}, and 4 asked for."),
    ],
)
def test_sizes_that_do_not_agree_are_an_error(tmp_path: Path, sizes: tuple[int, ...], got: str) -> None:
    file = write(tmp_path, make_plan("1f1b", 2, 4))
    with pytest.raises(ValueError, match=re.escape(got.format(file=file))):
        make_plan(file, *sizes)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "missing.txt"
    with pytest.raises(ValueError, match=re.escape(f"Got {str(file)!r}: No such file or directory.")):
        make_plan(str(file), 2, 4)


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "picture.txt"
    file.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="it is not text"):
        make_plan(str(file), 2, 4)
