"""The output and exit codes of the quick commands, called in this process."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

import meshpipe
from meshpipe.cli import main

RECIPES = Path(__file__).resolve().parents[1] / "tiny_recipes.py"


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder for commands called in this process, where JAX has eight devices."""
    assert jax.device_count() == 8
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.py").write_text(RECIPES.read_text())
    return tmp_path


def test_recipes_lists_layouts(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["recipe", "pipeline", "data", "tensor", "devices", "about"]
    assert [" ".join(row) for row in rows] == [
        "tiny:single 1 1 1 1 One device.",
        "tiny:pipeline 2 1 1 2 Two ranks.",
        "tiny:long_names 1 1 1 1 One device, and paths too long to be saved.",
    ]


def test_recipes_marks_those_for_accelerators(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = "\n\ndef large() -> Config:\n    return replace(pipeline(), for_accelerators=True)\n"
    (in_process / "recipes" / "tiny.py").write_text(RECIPES.read_text() + large)
    assert main(["recipes"]) == 0
    *_, large_row, note = capsys.readouterr().out.splitlines()
    assert large_row.split() == ["tiny:large", "2", "1", "1", "2*"]
    assert note.startswith("* accelerators;")


def test_recipes_lists_the_others_when_one_fails(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_process / "recipes" / "broken.py").write_text("def fails() -> Config:\n    return 3\n")
    assert main(["recipes"]) == 2
    captured = capsys.readouterr()
    assert "tiny:pipeline" in captured.out
    assert "recipes/broken.py fails on line 1" in captured.err


def test_recipes_of_meshpipe_are_listed_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert "\ntext_classifier:pipeline " in out
    assert out.endswith("These come with meshpipe. `meshpipe init DIR` copies them to DIR/recipes, to be changed.\n")
    assert main(["train", "text_classifier:pipeline", "--help"]) == 0
    assert main(["train", "recipes/text_classifier.py:pipeline"]) == 2
    assert "Did you mean text_classifier:pipeline?" in capsys.readouterr().err


def test_plan_shows_stages_grid_bubble_and_memory(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", "--num-microbatches", "2", "--plot", "a.png"]) == 0
    out = capsys.readouterr().out
    assert "tiny:pipeline: pipeline 2 x data 1 x tensor 1 = 2 devices" in out
    assert "2 Dense" in out
    assert "rank 1  .    1F0  1B0  1F1  1B1  ." in out
    assert "Expected bubble 33.3%" in out
    assert "activations" in out
    assert out.count("  none") == 2
    assert (in_process / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_schedule_can_be_run(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", "--schedule", "zb-h1", "--save-schedule", "mine.txt"]) == 0
    assert "Saved to mine.txt" in capsys.readouterr().out
    assert main(["plan", "tiny:pipeline", "--schedule", "mine.txt"]) == 0
    assert "0I0" in capsys.readouterr().out


def test_all_schedules_are_compared(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", "--compare"]) == 0
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert rows["1f1b"][:3] == ["1", "15", "20.0%"]
    assert rows["zb-v"][:3] == ["2", "12.5", "4.0%"]


@pytest.mark.parametrize(
    "flags", ["--save-schedule plan.json", "--save-schedule no/plan.txt", "--compare --plot a.png"]
)
def test_invalid_flags_of_plan(in_process: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", *flags.split()]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_plan_measures_layers_and_proposes_a_cut(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure = ["--num-microbatches", "4", "--partition", "1", "--profile", "--save-costs", "costs.json"]
    assert main(["plan", "tiny:pipeline", *measure]) == 0
    out = capsys.readouterr().out
    assert "Measured on cpu (data 1 x tensor 1) in " in out
    assert re.search(r"^ +([0-2]-)?3 +Dense +[\d.]+ ", out, re.MULTILINE)
    assert "given" in out
    assert "Predicted step: " in out
    assert ", by costs measured on cpu in " in out
    assert main(["plan", "tiny:pipeline", "--schedule", "auto", "--costs", "costs.json"]) == 0
    out = capsys.readouterr().out
    assert "by costs of costs.json, measured on cpu." in out
    assert re.search(r"^auto.*, 4 microbatches", out, re.MULTILINE)


def test_plan_chooses_what_is_computed_again(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", "--remat", "auto", "--memory-limit", "3.3kB"]) == 0
    out = capsys.readouterr().out
    assert "remat auto (full none);" in out


def test_plan_lays_out_what_this_machine_lacks(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"{RECIPES.parents[1] / 'recipes' / 'language_model.py'}:debug"
    assert main(["plan", recipe, "--model.attention", "cudnn", "--model.dtype", "bfloat16"]) == 0
    assert "cuDNN is asked for; this plan is laid out on CPU devices and counts XLA's." in capsys.readouterr().out


def test_verify_agrees(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "tiny:pipeline", "--updates", "2"]) == 0
    out = capsys.readouterr().out
    assert "Compared over 2 updates with plain training of the same layers one after the other on one device." in out
    assert "Equal to plain training on one device; relative tolerance 0.0003." in out
    assert "layers/3" in out


UNCUT = """

class Stack(nnx.Module):
    def __init__(self, rngs, depth=4):
        self.blocks = nnx.List([Dense(8, 8, rngs=rngs) for _ in range(depth)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return SCALE * x


class UncutConfig(DenseConfig):
    def reference(self):
        from meshpipe import Reference

        return Reference(Stack)


def uncut() -> Config:
    return replace(pipeline(), model=UncutConfig())
"""


@pytest.mark.parametrize(
    ("scale", "code", "flags", "model"),
    [
        ("1.0", 0, "", "the uncut Stack"),
        ("1.1", 1, "", "the uncut Stack"),
        ("1.0", 0, "--lora.rank 2 --lora.rank-stabilised", "the uncut Stack, adapters in its kernels"),
    ],
)
def test_verify_compares_with_the_reference_of_a_recipe(
    in_process: Path, capsys: pytest.CaptureFixture[str], scale: str, code: int, flags: str, model: str
) -> None:
    (in_process / "recipes" / "uncut.py").write_text(RECIPES.read_text() + UNCUT.replace("SCALE", scale))
    assert main(["verify", "uncut:uncut", "--updates", "1", *flags.split()]) == code
    captured = capsys.readouterr()
    assert f"Compared over 1 update with plain training of {model} on one device." in captured.out
    assert ("differs in update 1" in captured.err) == bool(code)


def test_verify_refuses_a_reference_that_does_not_correspond(
    in_process: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = UNCUT.replace("SCALE", "1.0").replace("depth=4", "depth=3")
    (in_process / "recipes" / "uncut.py").write_text(RECIPES.read_text() + text)
    assert main(["verify", "uncut:uncut", "--updates", "1"]) == 2
    assert "Every leaf of the layers must be one of the reference. layers/3/linear/bias" in capsys.readouterr().err


def test_verify_names_the_first_layer_that_differs(
    in_process: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from meshpipe.reference.plain import PlainTraining

    honest = PlainTraining.gradients

    def doubled(self: PlainTraining, *arguments: Any) -> Any:
        found = honest(self, *arguments)
        factors = {path: 2 if path.startswith("layers/2/") else 1 for path in found.gradients}
        return replace(found, gradients={path: leaf * factors[path] for path, leaf in found.gradients.items()})

    monkeypatch.setattr(PlainTraining, "gradients", doubled)
    assert main(["verify", "tiny:pipeline", "--updates", "1"]) == 1
    assert "meshpipe: the first difference is in layers/2: gradient layers/2/" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["", "train", "checkpoint", "data", "weights", "recipes", "init", "doctor", "launch", "metrics"]
)
def test_help_of_commands(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: meshpipe" in out
    assert max(map(len, out.splitlines())) <= 80


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"meshpipe {meshpipe.__version__}\n"


def test_help_of_a_recipe_shows_every_flag(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny:pipeline", "--help-all"]) == 0
    out = capsys.readouterr().out
    flags = """--mesh.pipeline --mesh.data --mesh.tensor --schedule --stages-per-rank --num-microbatches --remat --steps
        --batch-size --seed --learning-rate --checkpoint-dir --checkpoint-every --checkpoint-keep --resume --resume-from
        --auto-resume --metrics
        --eval-every --measure-every --trace --partition --costs --memory-limit --data.count --model.width"""
    for flag in flags.split():
        assert f"{flag} " in out or f"{flag}, " in out, flag


def test_a_plan_says_which_flags_it_does_not_use(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", "--run-dir", "run", "--checkpoint-every", "3", "--steps", "9"]) == 0
    assert "plan makes no run, so it does not use --checkpoint-every, --run-dir." in capsys.readouterr().err
    assert not (in_process / "run").exists()
