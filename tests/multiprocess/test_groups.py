"""Several trainers in one group of processes do not receive each other's values."""

import json
from pathlib import Path

from processes import run_processes

SCRIPT = str(Path(__file__).parent / "two_trainers.py")


def test_two_trainers_at_once_match_one_process(tmp_path: Path) -> None:
    ended = run_processes(2, [SCRIPT], tmp_path), run_processes(1, [SCRIPT], tmp_path)
    together, (alone,) = (
        [json.loads(line[7:]) for log in of.logs for line in log.splitlines() if line.startswith("RESULT ")]
        for of in ended
    )
    assert len(together) == 2, ended[0]
    assert alone["held out"][0] != alone["held out"][1]
    for found in together:
        assert found == alone, ended  # and no evaluation leaves a key with the coordinator
