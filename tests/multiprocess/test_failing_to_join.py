"""A process that fails before it has joined the others of its run ends them with the reason, at once."""

from pathlib import Path

import pytest
from processes import ROOT, run_processes

TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
RAISING = "def pipeline():\n    raise OSError('the disk is gone')\n"


@pytest.mark.parametrize(
    ("failing", "recipe", "flags", "code", "printed", "told"),
    [
        (1, TINY, "--no-such-flag 3", 2, "There is no flag --no-such-flag", "There is no flag --no-such-flag"),
        pytest.param(0, TINY, "--steps many", 2, "--steps", "a flag is wrong", marks=pytest.mark.slow),
        pytest.param(0, "gone.py:pipeline", "", 2, "gone.py", "gone.py", marks=pytest.mark.slow),
        pytest.param(1, "raising.py:pipeline", "", 2, "fails on line 2", "disk is gone", marks=pytest.mark.slow),
        pytest.param(1, TINY, "--secret-file gone", 2, "secret-file must be", "--secret-file", marks=pytest.mark.slow),
    ],
    ids=["flag", "value", "recipe", "error", "secret"],
)
def test_a_process_that_cannot_join_ends_the_others(
    failing: int, recipe: str, flags: str, code: int, printed: str, told: str, tmp_path: Path
) -> None:
    (tmp_path / "raising.py").write_text(RAISING)
    own = [[TINY], [TINY]]
    own[failing] = [recipe, *flags.split()]
    ended = run_processes(2, ["-m", "meshpipe", "train"], tmp_path, own)
    assert ended.codes == [code, code], ended  # and none was killed: it takes less than they would wait for each other
    assert printed in ended.logs[failing], ended
    assert f"process {failing} stops" not in ended.logs[failing], ended  # it has said why
    assert f"process {failing} on " in ended.logs[1 - failing], ended
    assert told in ended.logs[1 - failing], ended
    assert "Traceback" not in ended.logs[1 - failing], ended


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    ("command", "what"), [("generate", ["--prompt", "a"]), ("eval", ["--data", "text.txt"])], ids=["generate", "eval"]
)
def test_the_same_of_other_commands(command: str, what: list[str], failing: int, tmp_path: Path) -> None:
    own = [["folder", *what] for _ in range(3)]
    own[failing].append("--no-such-flag")
    ended = run_processes(3, ["-m", "meshpipe", command], tmp_path, own)
    assert ended.codes == [2, 2, 2], ended
    for log in ended.logs:
        assert "Traceback" not in log, ended


@pytest.mark.slow
def test_processes_that_are_given_other_counts_end_with_code_2(tmp_path: Path) -> None:
    ended = run_processes(2, ["-m", "meshpipe", "train", TINY], tmp_path, last=[[], ["--process-count", "3"]])
    assert ended.codes == [2, 2], ended
    for log in ended.logs:
        assert "must be given the same --process-count. Got " in log, ended
        assert "Traceback" not in log, ended


@pytest.mark.slow
def test_all_processes_that_fail_alike_end_at_once(tmp_path: Path) -> None:
    ended = run_processes(2, ["-m", "meshpipe", "train", TINY, "--no-such-flag"], tmp_path)
    assert ended.codes == [2, 2], ended
    for log in ended.logs:
        assert "There is no flag --no-such-flag" in log, ended
