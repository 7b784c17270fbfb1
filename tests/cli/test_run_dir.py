"""Runs with a folder for all their outputs, called in this process, where JAX has eight devices."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from event_files import scalars

from meshpipe.checkpoint import Checkpointer
from meshpipe.checkpoint.lock import _boot
from meshpipe.cli import main

TOKENS = """
from dataclasses import dataclass, replace
from tests import tiny_recipes as tiny
from tests.tiny_recipes import Config

@dataclass(frozen=True, kw_only=True)
class Model(tiny.DenseConfig):
    def tokens(self, batch): return batch["inputs"].size

def pipeline() -> Config: return replace(tiny.pipeline(), model=Model())
"""
OUTPUTS = {"config.json", "metrics.jsonl", "metrics.png", "log.txt", "checkpoints", "trace.json", "trace.png"}


def events(file: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run-dir")
    (folder / "recipe.py").write_text(TOKENS)
    return folder


def train(place: Path, flags: str) -> int:
    return main(["train", f"{place / 'recipe.py'}:pipeline", *flags.format(place=place).split()])


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """The folder of a run of six steps, which nobody changes. A run was killed there before its first step."""
    folder = place / "runs" / "first"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "writer.lock").write_text(json.dumps({"boot": _boot()}))
    for name in ("metrics.jsonl", "log.txt"):
        (folder / name).touch()
    assert jax.device_count() == 8
    assert train(place, "--run-dir {place}/runs/first --steps 6 --track tensorboard --profile-steps 4:6") == 0
    return folder


def test_everything_is_in_the_folder(run: Path) -> None:
    assert names(run) == OUTPUTS | {"tensorboard", "profile"}
    assert Checkpointer(run / "checkpoints").steps() == [6]
    settings = json.loads((run / "config.json").read_text())
    assert settings["config"]["steps"] == 6
    assert settings["recipe"].endswith("recipe.py:pipeline")
    for picture in ("metrics.png", "trace.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    log = [line[21:] for line in (run / "log.txt").read_text().splitlines()]
    assert any(re.match(r"Compiled and initialised in [\d.]+ s\.", line) for line in log)
    assert [line.split()[1] for line in log if re.match(r"step \d+/6 ", line)] == [f"{n}/6" for n in range(1, 7)]
    assert any(line.startswith("Completed after step 6 of 6") for line in log)


def test_steps_say_tokens_memory_and_waiting(run: Path) -> None:
    steps = events(run / "metrics.jsonl", "step")
    assert [line["tokens_seen"] for line in steps] == [16 * 8 * n for n in range(1, 7)]
    flops = events(run / "metrics.jsonl", "start")[0]["model_flops_per_step"]
    assert flops == (3 * 4 - 1) * 2 * 16 * 8 * 8  # four layers, of which the first has no gradient of its input
    for line in steps:
        assert line["tokens_per_s_per_device"] == pytest.approx(line["tokens_per_s"] / 2)
        assert line["model_flops_per_s_per_device"] == pytest.approx(flops / line["step_time_s"] / 2)
        assert 0 <= line["data_wait_share"] <= 1
        assert line["peak_host_memory_bytes"] > 10**8
        assert "model_flops_utilisation" not in line, "the peak of a CPU is not known"
    times = [line["time"] for line in steps]
    assert times == sorted(times)


def test_tensorboard_has_the_values_of_the_metrics_file(run: Path) -> None:
    found = scalars(run / "tensorboard")
    for line in events(run / "metrics.jsonl", "step"):
        assert found["train/loss", line["step"]] == pytest.approx(line["loss"], rel=1e-6)
    assert ("eval/loss", 6) in found


def test_the_profile_has_the_steps_of_the_window(run: Path) -> None:
    (file,) = (run / "profile").rglob("*.xplane.pb")
    space = jax.profiler.ProfileData.from_file(str(file))
    marked = {
        value
        for plane in space.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
        for name, value in event.stats
        if name == "step_num"
    }
    assert {int(value) for value in marked} == {4, 5}


def test_a_used_folder_is_refused_without_resume(run: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert train(place, "--run-dir {place}/runs/first") == 2
    error = capsys.readouterr().err
    assert "A new run needs a --run-dir of its own" in error
    assert "Pass --resume to continue that run, or name another folder." in error
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_used_folder_without_a_checkpoint_has_another_way_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "runs" / "failed"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert train(place, "--run-dir {place}/runs/failed") == 2
    assert "saved nothing to continue from: name another folder, or remove this one." in capsys.readouterr().err
    assert train(place, "--run-dir {place}/runs/failed --resume") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"--resume needs a complete checkpoint in --run-dir. Got '{folder}', whose run saved none." in error
    assert "leave --resume out, and name another folder or remove this one." in error


def test_a_resumed_run_continues_in_the_folder(run: Path, place: Path) -> None:
    folder = place / "runs" / "continued"
    shutil.copytree(run, folder)
    assert train(place, "--run-dir {place}/runs/continued --steps 8 --resume --track tensorboard") == 0
    steps = events(folder / "metrics.jsonl", "step")
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["tokens_seen"] for line in steps] == [16 * 8 * n for n in range(1, 9)]
    assert Checkpointer(folder / "checkpoints").steps() == [6, 8]
    assert json.loads((folder / "config.json").read_text())["config"]["steps"] == 8
    log = (folder / "log.txt").read_text()
    assert "Completed after step 6 of 6" in log
    assert "Completed after step 8 of 8" in log
    assert {step for tag, step in scalars(folder / "tensorboard") if tag == "train/loss"} == set(range(1, 9))


def test_single_flags_take_precedence(place: Path) -> None:
    flags = "--run-dir {place}/runs/single --metrics {place}/mine.jsonl --trace {place}/mine.json --eval-batches 0"
    assert train(place, f"{flags} --checkpoint-dir {{place}}/mine --steps 3") == 0
    assert names(place / "runs" / "single") == {"config.json", "log.txt", "metrics.png"}
    assert len(events(place / "mine.jsonl", "step")) == 3
    assert Checkpointer(place / "mine").steps() == [3]
    assert (place / "mine.json").is_file()


def test_a_run_that_is_refused_leaves_no_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, phrase in (
        ("--schedule nonsense", "The schedule must be one of"),
        ("--resume", "needs a complete checkpoint"),
        ("--profile-steps 5:9 --steps 6", "--profile-steps must lie within the run"),
    ):
        assert train(place, f"--run-dir {{place}}/refused/deep {flags}") == 2
        assert phrase in capsys.readouterr().err
        assert not (place / "refused").exists()


def test_a_missing_package_is_told_with_its_remedy(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert train(place, "--run-dir {place}/untracked --track tensorboard") == 2
    error = capsys.readouterr().err
    assert "--track tensorboard needs the package tensorboardX, which is not installed." in error
    assert "pip install 'meshpipe[tensorboard]'" in error
    assert not (place / "untracked").exists()
