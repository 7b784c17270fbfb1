"""Processes share one folder for a run: process 0 writes its metrics and log, and each its own trace and profile."""

import json
from pathlib import Path

import pytest
from event_files import scalars
from processes import ROOT, run_processes

from meshpipe.checkpoint import list_checkpoints

RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"


@pytest.mark.slow
def test_two_processes_write_into_one_folder_and_continue(tmp_path: Path) -> None:
    command = ["-m", "meshpipe", "train", RECIPE, "--run-dir", "run", "--track", "tensorboard"]
    for flags in (["--steps", "5", "--profile-steps", "4:5"], ["--steps", "7", "--resume"]):
        ended = run_processes(2, [*command, *flags], tmp_path)
        assert ended.codes == [0, 0], str(ended)
    run = tmp_path / "run"
    expected = {"config.json", "log.txt", "metrics.jsonl", "metrics.png", "checkpoints", "tensorboard", "profile"}
    expected |= {"trace.json", "trace.png", "trace.process1.json", "trace.process1.png"}
    assert {path.name for path in run.iterdir()} == expected
    assert list_checkpoints(run / "checkpoints") == [5, 7]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 8))
    # Four layers of 8 x 8 in two stages, one in each process, on 16 examples, which have no gradient themselves.
    counted = {line["model_flops_per_step"] for line in lines if line["event"] == "start"}
    assert counted == {(3 * 4 - 1) * 2 * 16 * 8 * 8}
    assert {step for tag, step in scalars(run / "tensorboard") if tag == "train/loss"} == set(range(1, 8))
    assert len(list((run / "profile" / "plugins").rglob("*.xplane.pb"))) == 1
    assert len(list((run / "profile" / "process1").rglob("*.xplane.pb"))) == 1


@pytest.mark.slow
def test_all_processes_refuse_a_used_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    ended = run_processes(2, ["-m", "meshpipe", "train", RECIPE, "--run-dir", "run"], tmp_path)
    assert ended.codes == [2, 2], str(ended)
    for log in ended.logs:
        assert "A new run needs a --run-dir of its own" in log
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
