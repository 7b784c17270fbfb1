"""Checkpoints of several processes: each writes and reads its own shards, a step is there as a whole or not at all, and
a run goes on with another number of processes.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from damage import KINDS, damage_each_file, remake_checksums
from processes import ROOT, Ended, run_processes

from meshpipe.checkpoint import Checkpointer, CheckpointError, list_checkpoints, verify_checkpoint

ARRAYS = str(Path(__file__).parent / "save_arrays.py")
RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"


def results(ended: Ended) -> list[dict[str, Any]]:
    lines = [line for log in ended.logs for line in log.splitlines() if line.startswith("RESULT ")]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def test_arrays_of_two_processes(tmp_path: Path) -> None:
    ended = run_processes(2, [ARRAYS], tmp_path)
    assert ended.codes == [0, 0], ended
    first, second = results(ended)
    assert first["read"] == [
        *("stage_0/params.count/0", "stage_0/params.replicated/0.0", "stage_0/params.replicated/0.1"),
        *("stage_0/params.split/0.0", "stage_0/params.split/0.1"),
    ]
    assert second["read"] == [
        *("stage_0/params.count/0", "stage_0/params.count/0"),  # for each of its stages
        *("stage_0/params.replicated/0.0", "stage_0/params.replicated/0.1"),
        *("stage_0/params.split/1.0", "stage_0/params.split/1.1"),
        *("stage_1/params.moment/0.0", "stage_1/params.moment/0.1"),
        *("stage_1/params.own/0.0", "stage_1/params.own/1.0"),
    ]
    for found in (first, second):
        assert "must be what JSON can hold" in found["unprepared"], ended
        assert "process 1: no space left. The newest step there is 1." in found["failed"], ended
        assert "process 1 did not report for 0 s" in found["slow"], ended
        assert "what process 1 wrote is not in the " in found["not shared"], ended
    assert sorted(os.listdir(tmp_path / "run")) == ["1", "5"]
    check_damage(tmp_path / "run", 5)


def check_damage(folder: Path, step: int) -> None:
    """Damage to any file that several processes wrote is found by verify and by a restore of all leaves in one."""
    saved = Checkpointer(folder).leaves(step)
    wanted = {
        name.removeprefix("params/"): jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in saved.items()
    }
    found = 0
    for kind in KINDS:
        for name in damage_each_file(folder / str(step), kind):
            problems = verify_checkpoint(folder, step)
            assert problems, f"{kind} of {name} was not found"
            assert name in problems[0]
            with pytest.raises(CheckpointError, match="is damaged: "):
                Checkpointer(folder).restore(step, [{"params": wanted}])
            found += 1
    assert found >= 60
    assert verify_checkpoint(folder, step) == []


@pytest.mark.slow
def test_a_step_with_a_killed_process_is_not_listed(tmp_path: Path) -> None:
    ended = run_processes(2, [ARRAYS, "--kill"], tmp_path)
    assert ended.codes == [0, -9], ended
    assert "process 1 did not report for 3 s" in results(ended)[0]["failed"], ended
    assert list_checkpoints(tmp_path / "run") == [1]
    assert verify_checkpoint(tmp_path / "run", 1) == []


def train(folder: Path, processes: int, *flags: str) -> dict[int, float]:
    """Trains the tiny recipe, saving into the folder `run`; the losses by step."""
    metrics = folder / f"metrics-{len(list(folder.iterdir()))}.jsonl"
    options = ["--checkpoint-dir", "run", "--eval-batches", "0", "--metrics", str(metrics), *flags]
    ended = run_processes(processes, ["-m", "meshpipe", "train", RECIPE, *options], folder)
    assert not any(ended.codes), ended
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


@pytest.mark.slow
def test_saved_by_two_processes_and_resumed_by_one(tmp_path: Path) -> None:
    together = train(tmp_path, 2, "--steps", "4", "--checkpoint-every", "2")
    assert verify_checkpoint(tmp_path / "run", 2) == []
    check_refused_together(tmp_path)
    alone = train(tmp_path, 1, "--steps", "4", "--resume-from", "2")
    assert alone == {step: together[step] for step in (3, 4)}
    assert sorted(os.listdir(tmp_path / "run")) == ["2", "4", "4.superseded"]


def check_refused_together(folder: Path) -> None:
    """Damage that only process 1 reads ends both processes, before they compile."""
    shutil.copytree(folder / "run", folder / "damaged")
    weights = next(path for path in (folder / "damaged" / "4" / "stage_1").glob("params.*/*") if path.name != ".zarray")
    content = bytearray(weights.read_bytes())
    content[0] ^= 1
    weights.write_bytes(content)
    command = ["-m", "meshpipe", "train", RECIPE, "--checkpoint-dir", "damaged", "--steps", "6", "--resume"]
    ended = run_processes(2, command, folder)
    assert ended.codes == [2, 2], ended
    assert "Compiled" not in ended.logs[0], ended
    for log in ended.logs:
        assert f"{weights.relative_to(folder / 'damaged' / '4')} has changed bytes" in log, ended
        assert "Pass --resume-from 2, the newest intact step." in log, ended
    assert not (folder / "damaged" / "writer.lock").exists(), ended


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moves", "tolerance"),
    [
        pytest.param([(1, ""), (2, "")], 0, id="the same submeshes"),
        pytest.param(
            [(2, ""), (4, "--mesh.data 2"), (1, "--mesh.tensor 2"), (4, "--mesh.pipeline 4")], 1e-6, id="any layout"
        ),
    ],
)
def test_moves_between_numbers_of_processes(moves: list[tuple[int, str]], tolerance: float, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    last = 2 * len(moves)
    stayed = train(tmp_path / "other", 1, "--steps", str(last))
    moved: dict[int, float] = {}
    for steps, (processes, flags) in zip(range(2, last + 1, 2), moves, strict=True):
        moved |= train(tmp_path, processes, "--steps", str(steps), "--auto-resume", *flags.split())
    assert list(moved) == list(stayed)
    assert moved == pytest.approx(stayed, rel=tolerance, abs=0)
    positions = [Checkpointer(folder / "run").metadata(last)["data"] for folder in (tmp_path, tmp_path / "other")]
    assert positions[0] == positions[1]


@pytest.mark.slow
def test_a_step_that_differs_between_processes_is_refused_in_all(tmp_path: Path) -> None:
    """As on two machines without a shared disk: each has a step 2, but not of the same training."""
    train(tmp_path, 1, "--steps", "2")
    one, other = tmp_path / "run", shutil.copytree(tmp_path / "run", tmp_path / "other")
    leaf = next(path for path in sorted((other / "2").rglob("0.0")) if path.stat().st_size)
    leaf.write_bytes(leaf.read_bytes()[::-1])
    remake_checksums(other / "2")
    assert verify_checkpoint(other, 2) == []
    train_on = ["-m", "meshpipe", "train", RECIPE, "--steps", "4", "--checkpoint-dir"]
    for flags in (["--resume"], ["--init-from"]):
        places = [[str(folder)] for folder in (one, other)]
        own = [[*place, *flags] if flags == ["--resume"] else ["new", *flags, *place] for place in places]
        ended = run_processes(2, train_on, tmp_path, own)
        assert ended.codes == [2, 2], ended
        for log in ended.logs:
            assert "which differs between process 0 and 1. Name a folder on a file system that they share" in log, ended
            assert "Traceback" not in log, ended
    leaf.unlink()
    ended = run_processes(2, train_on, tmp_path, [[str(folder), "--resume"] for folder in (one, other)])
    assert ended.codes == [2, 2], ended
    for log in ended.logs:
        assert f"is damaged: {leaf.relative_to(other / '2')} is missing" in log, ended
