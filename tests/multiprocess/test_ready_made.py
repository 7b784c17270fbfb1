"""Ready-made layers that share a variable are tied, released and loaded across processes as in one."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import Ended, run_processes

SCRIPT = str(Path(__file__).parent / "ready_made.py")
OWNER, BORROWED = "layers/0/embedding", "layers/3/table/embedding"


def results(ended: Ended) -> list[dict[str, Any]]:
    assert not any(ended.codes), ended
    lines = [line for log in ended.logs for line in log.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


@pytest.mark.slow
def test_layers_that_share_a_variable_train_as_in_one_process(tmp_path: Path) -> None:
    (alone,) = results(run_processes(1, [SCRIPT], tmp_path))
    together = results(run_processes(2, [SCRIPT], tmp_path))
    assert alone["tied"] == [[OWNER, BORROWED]]
    assert alone["loaded"] == alone["trained"]  # the owner's value counts
    assert alone["trained"][OWNER] == alone["trained"][BORROWED]
    for found in (alone, *together):
        assert found["tied"] == alone["tied"]
        assert found["losses"] == alone["losses"]
        assert all(found["released"]), found
    for when in ("trained", "loaded"):
        assert BORROWED in together[1][when]
        assert together[0][when] | together[1][when] == alone[when]
