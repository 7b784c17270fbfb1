"""Several processes predict and evaluate as one does; each has the modules of its own stages, and can load all."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, Ended, run_processes

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


@pytest.mark.slow
@pytest.mark.parametrize(("count", "ranks"), [(2, 2), (3, 1), (3, 2)])
def test_a_command_of_several_processes_evaluates_every_held_out_example_once(
    count: int, ranks: int, tmp_path: Path
) -> None:
    """64 points in batches of 12: the last has 4, fewer than a microbatch, and the data axis has 3 parts.

    Three processes with two ranks: the second has devices of both, and sends to and receives from both others.
    """
    recipe = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
    flags = f"--mesh.pipeline {ranks} --mesh.data 3 --num-microbatches 2 --batch-size 12 --steps 2 --eval-batches 9"
    found = []
    for processes in (1, count):
        metrics = tmp_path / f"{processes}.jsonl"
        command = ["-m", "meshpipe", "train", recipe, *flags.split(), "--metrics", str(metrics)]
        ended = run_processes(processes, command, tmp_path)
        assert not any(ended.codes), ended
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        found += [line["loss"] for line in lines if line["event"] == "eval"]
    alone, together = found
    assert together == pytest.approx(alone, rel=1e-6)  # three parts are added in another order between processes
