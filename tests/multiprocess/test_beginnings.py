"""Runs of two processes that skip batches, or begin from a checkpoint of another run, have the steps of one process."""

import json
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, run_processes

TRAIN = ["-m", "meshpipe", "train", f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline", "--eval-batches", "0"]
POISONED = ["--data.count", "64", "--data.poisoned", "3"]
"""One point in 64 is not finite, so one batch in each epoch of four is not."""

pytestmark = pytest.mark.slow


def steps(count: int, folder: Path, flags: str) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Step, loss and why the update was left out of every step of a run, and the logs of its processes."""
    ended = run_processes(count, [*TRAIN, *flags.split(), "--metrics", f"{count}.jsonl"], folder)
    assert not any(ended.codes), ended
    lines = map(json.loads, (folder / f"{count}.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line.get("left_out")) for line in lines if line["event"] == "step"], ended.logs


def test_all_processes_skip_the_same_batches(tmp_path: Path) -> None:
    flags = " ".join(["--steps 9 --skip-nonfinite 3", *POISONED])
    alone, _ = steps(1, tmp_path, flags)
    together, logs = steps(2, tmp_path, flags)
    assert [step for step, _, _ in alone] == list(range(1, 10))
    assert sum(reason == "not finite" for _, _, reason in alone) >= 2
    assert together == alone, logs


@pytest.mark.parametrize("more", ["", "--init-what all"], ids=["weights", "everything"])
def test_a_run_begins_from_a_checkpoint_of_another(more: str, tmp_path: Path) -> None:
    steps(2, tmp_path, "--steps 4 --checkpoint-dir first")
    (tmp_path / "2.jsonl").unlink()
    flags = f"--steps 8 --init-from first {more}"
    alone, _ = steps(1, tmp_path, flags)
    together, logs = steps(2, tmp_path, f"{flags} --checkpoint-dir second")
    assert [step for step, _, _ in together] == list(range(5 if more else 1, 9))
    assert together == alone, logs
    for number, log in enumerate(logs):
        assert ("step 4 of first" in log) == (number == 0), logs
