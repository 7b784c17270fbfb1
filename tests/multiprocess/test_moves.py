"""Between processes, each move of a step is one call with all arrays of its value, and a step has no other moves."""

import json
from pathlib import Path

import pytest
from processes import run_processes

SCRIPT = str(Path(__file__).parent / "count_moves.py")
MICROBATCHES = 4
SENT = [MICROBATCHES * 3, MICROBATCHES * 4]
"""By rank. For each microbatch, rank 0 sends the named value (once, though two stages of rank 1 read it), the value of
stage 2 and the gradient of that of stage 1. Rank 1 sends the value of stage 1, the gradient of that of stage 2, and the
named value's gradients of its two stages."""

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("way", ["sockets", "server", "native"])
def test_a_step_has_one_call_for_each_move_of_its_program(way: str, tmp_path: Path) -> None:
    command = [SCRIPT, "--native"] if way == "native" else [SCRIPT, "--transfers", way]
    ended = run_processes(2, command, tmp_path), run_processes(1, [SCRIPT], tmp_path)
    together, (alone,) = (
        [json.loads(line[7:]) for log in of.logs for line in log.splitlines() if line.startswith("RESULT ")]
        for of in ended
    )
    assert len(together) == 2, ended[0]
    for rank, found in enumerate(together):
        assert found["losses"] == alone["losses"], ended[0]
        assert found["sent"] == SENT, ended[0]
        # Over sockets and by the transfer server only the sender is counted; for a transport of the backend, both are.
        moves = sum(SENT) if way == "native" else SENT[rank]
        of_update = 2 if way == "native" else 1  # the sums of squares to the last stage, and what it decides back
        assert len(found["counts"]) == moves + of_update, ended[0]
        assert found["counts"][:moves] == [2] * moves, f"both arrays of a value go together: {ended[0]}"
    assert alone["counts"] == []
