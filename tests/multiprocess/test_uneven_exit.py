"""A user's loop whose processes take different numbers of steps ends with a message."""

from pathlib import Path

import pytest
from processes import run_processes

SCRIPT = str(Path(__file__).parent / "uneven_steps.py")


@pytest.mark.parametrize("steps", [(2, 2), (4, 2), pytest.param((2, 4), marks=pytest.mark.slow)])
def test_processes_with_different_numbers_of_steps(steps: tuple[int, int], tmp_path: Path) -> None:
    ended = run_processes(2, [SCRIPT], tmp_path, [["--steps", str(number)] for number in steps])
    assert [log.count("loss") for log in ended.logs] == [2, 2] if steps[0] == steps[1] else True, ended
    if steps[0] == steps[1]:
        assert ended.codes == [0, 0], ended
        return
    assert ended.codes == [1, 1], ended
    fewer, more = (1, 0) if steps[0] > steps[1] else (0, 1)
    sentence = f"because process {fewer} has ended after 2 steps and evaluations of a trainer, of which process {more}"
    assert all(sentence in log for log in ended.logs), ended
