"""Several processes predict and evaluate as one does; each has the modules of its own stages, and can load all."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import Ended, run_processes

SCRIPT = str(Path(__file__).parent / "use_trained.py")


def results(ended: Ended) -> list[dict[str, Any]]:
    assert not any(ended.codes), ended
    lines = [line for log in ended.logs for line in log.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def run(count: int, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    return results(run_processes(count, [SCRIPT], folder))


@pytest.mark.slow
def test_several_processes_use_a_trained_model_as_one_does(tmp_path: Path) -> None:
    """Two of one rank each, and four that split the data axis of each rank between them."""
    (alone,) = run(1, tmp_path / "1")
    assert alone["rows"] == [16, 7, 16]
    assert alone["outputs"][0] == alone["outputs"][2]
    assert alone["modules"] == alone["updated"] == alone["loaded"]
    for count in (2, 4):
        together = run(count, tmp_path / str(count))
        held: dict[str, Any] = {}
        for found in together:
            assert {name: found[name] for name in ("rows", "outputs", "evaluated", "loaded")} == {
                name: alone[name] for name in ("rows", "outputs", "evaluated", "loaded")
            }
            assert found["modules"] == found["updated"]
            assert len(found["modules"]) < len(alone["modules"])
            held |= found["modules"]
        assert held == alone["modules"]
