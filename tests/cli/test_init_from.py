"""A run that starts from a checkpoint of another, with its weights only or continuing where it ended."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from meshpipe.checkpoint import Checkpointer
from meshpipe.cli import main
from meshpipe.runs.build import make_trainer
from tests import tiny_recipes

TINY = f"train {Path(__file__).parents[1] / 'tiny_recipes.py'}:pipeline --eval-batches 0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run `a`, which has saved steps 2 and 4, and the metrics of a run of 8 steps."""
    assert jax.device_count() == 8
    folder = tmp_path_factory.mktemp("runs")
    assert main(f"{TINY} --steps 4 --checkpoint-every 2 --checkpoint-dir {folder / 'a'}".split()) == 0
    assert main(f"{TINY} --steps 8 --metrics {folder / 'whole.jsonl'}".split()) == 0
    return folder


@pytest.fixture
def here(runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "a").symlink_to(runs / "a")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def arrays(folder: str, step: int) -> dict[str, np.ndarray]:
    checkpointer = Checkpointer(folder)
    shapes = {
        key: jax.ShapeDtypeStruct(tuple(leaf["shape"]), leaf["dtype"])
        for key, leaf in checkpointer.leaves(step).items()
    }
    sections = {key.partition("/")[0]: {} for key in shapes}
    for key, shape in shapes.items():
        section, _, path = key.partition("/")
        sections[section][path] = shape
    (tree,) = checkpointer.restore(step, [sections])
    return {f"{section}/{path}": np.asarray(leaf) for section, part in tree.items() for path, leaf in part.items()}


def steps_of(file: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def test_weights_only_start_a_new_run(here: Path, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(runs / "a")
    flags = "--steps 0 --seed 7 --optimizer sgd --checkpoint-dir b --init-from a --init-step 2 --metrics m.jsonl"
    assert main(f"{TINY} {flags}".split()) == 0
    assert "Started with the weights of step 2 of a." in capsys.readouterr().out
    new, old = arrays("b", 0), arrays("a", 2)
    weights = [key for key in old if key.startswith(("params/", "state/"))]
    assert weights
    for key in weights:
        np.testing.assert_array_equal(new[key], old[key])
    assert Checkpointer("b").metadata(0)["data"]["examples"] == 0
    start = json.loads((here / "m.jsonl").read_text().splitlines()[0])
    assert start["init_from"] == {"folder": "a", "step": 2, "what": "weights"}
    assert contents(runs / "a") == before


def test_weights_only_start_with_a_new_optimizer(here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "checkpoints").symlink_to(here / "a")
    assert main(f"{TINY} --steps 0 --checkpoint-dir b --init-from run".split()) == 0
    moments = {key: leaf for key, leaf in arrays("b", 0).items() if key.startswith("optimizer/")}
    assert moments
    assert not any(leaf.any() for leaf in moments.values())


def test_init_from_all_continues_like_the_run_itself(
    here: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Afterwards, the same flags resume from its own checkpoints."""
    begin = f"{TINY} --checkpoint-dir c --init-from a --init-what all --metrics m.jsonl --auto-resume"
    assert main(f"{begin} --steps 6".split()) == 0
    assert "Continued after step 4 of a." in capsys.readouterr().out
    assert main(f"{begin} --steps 8".split()) == 0
    assert "Resumed after step 6 of c." in capsys.readouterr().out
    whole = steps_of(runs / "whole.jsonl")
    assert steps_of(here / "m.jsonl") == {step: whole[step] for step in (5, 6, 7, 8)}


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        ("--init-from empty", "--init-from must name a folder with a complete checkpoint. Got 'empty'"),
        (
            "--init-from a --init-step 3",
            "--init-step must name a step that is saved in a. Got 3. Complete steps there: 2, 4",
        ),
        ("--init-step 3", "--init-step is for --init-from. Got it alone."),
        ("--init-what all", "--init-what is for --init-from. Got it alone."),
        ("--init-from a --init-what some", "invalid choice 'some'"),
        ("--init-from a --model.width 16 --data.width 16", "A leaf must be restored with its saved shape and dtype."),
        ("--init-from a --model.depth 5", "Every leaf to restore must be in the checkpoint. params/layers/4/"),
        (
            "--init-from a --model.depth 3",
            "Every weight of a checkpoint must belong to the model. params/layers/3/",
        ),
        ("--init-from a --init-what all --seed 3", "A resumed run must keep its --seed"),
        ("--init-from a --init-what all --steps 4", "--steps must be above the step that a run continues from."),
        ("--init-from a --resume", "--resume needs a complete checkpoint in --checkpoint-dir."),
        ("--init-from a/4/meta/metadata", "--init-from"),
    ],
)
def test_invalid_starts_are_refused(
    flags: str, phrase: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def must_not_compile(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("refused only after compiling")

    monkeypatch.setattr("meshpipe.stage.compile_stages.compile_stage", must_not_compile)
    (here / "empty").mkdir()
    assert main(f"{TINY} --checkpoint-dir new {flags}".split()) == 2
    assert phrase in re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().err)
    assert not (here / "new").exists()


def test_weights_in_a_custom_loop(here: Path) -> None:
    trainer = make_trainer(tiny_recipes.pipeline())
    trainer.check(trainer.step(tiny_recipes_batch()))
    trees = Checkpointer("a").restore(4, trainer.abstract_state_tree(optimizer=False))
    trainer.load_state_tree(trees, 0)
    assert trainer.step_number == 0
    saved = arrays("a", 4)
    for path, leaf in trainer.params.items():
        np.testing.assert_array_equal(np.asarray(leaf), saved[f"params/{path}"])
    moments = [leaf for tree in trainer.state_tree() for leaf in tree["optimizer"].values()]
    assert not any(np.asarray(leaf).any() for leaf in moments)


def tiny_recipes_batch() -> dict[str, np.ndarray]:
    config = tiny_recipes.pipeline()
    examples = [config.data.train_source()[i] for i in range(config.batch_size)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
