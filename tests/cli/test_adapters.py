"""Runs that train adapters: the base is frozen, and checkpoints hold the adapters and the digest of their base."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import meshpipe
from meshpipe.cli import main

TINY = f"{Path(__file__).parents[1] / 'tiny_recipes.py'}"
LORA = "--eval-batches 0 --lora.rank 2 --learning-rate 0.05"


def run(arguments: str) -> int:
    return main(f"train {TINY}:{arguments}".split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run of adapters on it that saved steps 2 and 4, and the metrics of one of 8 steps."""
    assert jax.device_count() == 8
    folder = tmp_path_factory.mktemp("adapters")
    at = Path.cwd()
    os.chdir(folder)
    try:
        assert run("single --steps 3 --eval-batches 0 --checkpoint-dir base") == 0
        on_base = f"pipeline {LORA} --init-from base"
        assert run(f"{on_base} --steps 4 --checkpoint-every 2 --checkpoint-dir tuned") == 0
        assert run(f"{on_base} --steps 8 --metrics whole.jsonl") == 0
    finally:
        os.chdir(at)
    return folder


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with copies of these runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("base", "tuned"):
        shutil.copytree(runs / name, name)
    return tmp_path


def losses(file: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def arrays(modules: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves([m.linear.kernel[...] for m in modules])]


def test_a_step_holds_adapters_and_their_optimizer_state_alone(runs: Path) -> None:
    leaves = meshpipe.Checkpointer(runs / "tuned").leaves(4)
    assert len([key for key in leaves if key.startswith("params/")]) == 8
    assert all("/lora/" in key for key in leaves if "layers/" in key)
    assert any(key.startswith("optimizer/") for key in leaves)
    record = meshpipe.Checkpointer(runs / "tuned").metadata(4)["frozen_base"]
    assert (record["folder"], record["step"]) == (str(runs / "base"), 3)


@pytest.mark.parametrize(
    "layout",
    [
        "--mesh.pipeline 4",
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("--mesh.pipeline 1 --mesh.data 2", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_continues_on_any_layout(here: Path, runs: Path, layout: str, capsys: Any) -> None:
    assert run(f"pipeline {LORA} --steps 8 --checkpoint-dir tuned --resume --metrics m.jsonl {layout}") == 0
    assert f"Its base is step 3 of {runs / 'base'}." in capsys.readouterr().out
    whole, resumed = losses(runs / "whole.jsonl"), losses(here / "m.jsonl")
    assert resumed.keys() == {5, 6, 7, 8}
    np.testing.assert_allclose([resumed[step] for step in resumed], [whole[step] for step in resumed], rtol=1e-5)


@pytest.mark.slow
def test_the_base_may_have_moved(here: Path, runs: Path, capsys: Any) -> None:
    (here / "base").rename("moved")
    assert run(f"pipeline {LORA} --steps 4 --checkpoint-dir tuned --resume --init-from moved --steps 5") == 0
    assert f"Its base is step 3 of {here / 'moved'}." in capsys.readouterr().out


def test_another_base_is_refused_before_anything_is_compiled(here: Path, capsys: Any) -> None:
    assert run("single --steps 3 --eval-batches 0 --seed 9 --checkpoint-dir other") == 0
    capsys.readouterr()
    assert run(f"pipeline {LORA} --steps 6 --checkpoint-dir tuned --resume --init-from other") == 2
    output, error = capsys.readouterr()
    assert "must meet the base that it was trained upon: base " in error
    assert "Pass the folder of the right one as --init-from." in error
    assert "Compiled" not in output


def test_a_base_that_is_gone_is_said_to_be(here: Path, capsys: Any) -> None:
    assert run(f"pipeline {LORA} --steps 6 --checkpoint-dir tuned --resume --init-from nothing") == 2
    assert f"step 3 of {here / 'gone'}" not in (error := capsys.readouterr().err)
    assert "needs its base " in error
    assert f"which {here / 'nothing'} does not hold. Pass the folder that does as --init-from." in error


def test_looking_at_checkpoints_tells_of_the_base(here: Path, runs: Path, capsys: Any) -> None:
    assert main(["checkpoint", "list", "tuned"]) == 0
    assert capsys.readouterr().out.count("trained alone") == 2
    assert main(["checkpoint", "show", "tuned"]) == 0
    assert f"step 3 of {runs / 'base'}" in capsys.readouterr().out
    assert main(["checkpoint", "verify", "tuned"]) == 0
    assert "every byte is good; it holds what was trained, without its base " in capsys.readouterr().out


def test_load_takes_the_base_and_merges(here: Path, runs: Path) -> None:
    adapters = meshpipe.load("tuned")
    assert all("/lora/" in path for path in adapters)
    merged = meshpipe.load("tuned", layers="recipe", merged=True)
    base = meshpipe.load("base", layers="recipe")
    whole = meshpipe.load("tuned", layers="recipe", base="base")
    for i, (one, other, adapted) in enumerate(zip(merged, base, whole, strict=True)):
        change = adapters[f"layers/{i}/linear/lora/lora_a"] @ adapters[f"layers/{i}/linear/lora/lora_b"] * 8
        np.testing.assert_allclose(one.linear.kernel[...], other.linear.kernel[...] + change, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(adapted.linear.kernel[...], other.linear.kernel[...])
    assert run("single --steps 1 --eval-batches 0 --seed 9 --checkpoint-dir other") == 0
    with pytest.raises(ValueError, match="must meet the base"):
        meshpipe.load("tuned", layers="recipe", base="other")
    with pytest.raises(ValueError, match="nothing does not hold"):
        meshpipe.load("tuned", layers="recipe", base="nothing")


@pytest.mark.slow
def test_adapters_on_first_values(here: Path, capsys: Any) -> None:
    start = f"pipeline {LORA} --checkpoint-dir seeded"
    assert run(f"{start} --steps 2") == 0
    assert run(f"{start} --steps 4 --resume --mesh.pipeline 4") == 0
    assert meshpipe.Checkpointer("seeded").metadata(4)["frozen_base"]["seed"] == 0
    loaded = meshpipe.load("seeded", layers="recipe")
    assert len(arrays(loaded)) == 4
    capsys.readouterr()
    assert run(f"pipeline {LORA} --checkpoint-dir new --init-from seeded --seed 5 --steps 2") == 2
    assert "Pass --seed 0." in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_saves_all_needs_no_base(here: Path) -> None:
    assert run(f"pipeline {LORA} --steps 2 --checkpoint-what all --init-from base --checkpoint-dir all") == 0
    (here / "base").rename("gone")
    assert "params/layers/0/linear/kernel" in meshpipe.Checkpointer("all").leaves(2)
    assert run(f"pipeline {LORA} --steps 4 --checkpoint-what all --checkpoint-dir all --resume") == 0


@pytest.mark.slow
def test_a_new_run_may_begin_with_adapters(here: Path, runs: Path) -> None:
    assert run(f"pipeline {LORA} --steps 2 --init-from tuned --checkpoint-dir next") == 0
    assert meshpipe.Checkpointer("next").metadata(2)["frozen_base"]["folder"] == str(runs / "base")
    assert run(f"pipeline {LORA} --steps 3 --checkpoint-dir next --resume") == 0


@pytest.mark.slow
def test_adapters_improve_a_trained_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = f"{Path(__file__).parents[2] / 'recipes' / 'language_model.py'}:debug"
    common = f"train {recipe} --num-microbatches 2"
    assert main(f"{common} --steps 60 --checkpoint-dir base --metrics base.jsonl".split()) == 0
    tune = f"{common} --init-from base --checkpoint-dir tuned --metrics tuned.jsonl --lora.rank 8"
    assert main(f"{tune} --steps 60".split()) == 0
    before, after = (held_out(tmp_path / f"{name}.jsonl") for name in ("base", "tuned"))
    assert after < before - 0.05


def held_out(file: Path) -> float:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [line["loss"] for line in lines if line["event"] == "eval"][-1]
