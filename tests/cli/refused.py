"""Wrong calls: one clear message with the way out, exit code 2, no traceback, and nothing written."""

import re
import shutil
from pathlib import Path

import jax
import pytest

from meshpipe.cli import main
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts, Setting

TINY = f"{Path(__file__).parents[1] / 'tiny_recipes.py'}:pipeline"
LANGUAGE = f"{Path(__file__).parents[2] / 'recipes' / 'language_model.py'}:debug"
CLASSES = f"{Path(__file__).parents[2] / 'recipes' / 'text_classifier.py'}:pipeline_data"
READ_COSTS = "--partition measured --costs costs.json"
COSTS = ModelCosts((LayerCosts("Dense", 1.0, 2.0, 1.0, 1.0, 0.0, 288, 256),) * 4, Setting(4, 1, 1, "none"), "cpu", 1.0)
RECIPES = Path(__file__).parent / "wrong_recipes"
Call = tuple[str | list[str], str]
"""Arguments, with names in capitals for longer ones, and a phrase of the message."""


def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder to call from, with files to name. Compiling anything there is an error."""
    assert jax.device_count() == 8  # starts JAX with the devices of the tests, before a command requests others
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("meshpipe.stage.compile_stages.compile_stage", must_not_compile)
    monkeypatch.setattr("meshpipe.choose.profile.compile_stage", must_not_compile)
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.jsonl").write_text('{"event": "end"}\n')
    COSTS.save(tmp_path / "costs.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "infinite.json").write_text(
        (tmp_path / "costs.json").read_text().replace('"forward": 1.0', '"forward": 1e999')
    )
    for recipe in RECIPES.glob("*.py"):
        shutil.copy(recipe, tmp_path)
    (tmp_path / "notes.txt.py").write_text("dear diary\n")
    return tmp_path


def must_not_compile(*arguments: object, **keywords: object) -> None:
    raise AssertionError("refused only after compiling")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


def split(arguments: str | list[str]) -> list[str]:
    names = {"TINY": TINY, "LANGUAGE": LANGUAGE, "CLASSES": CLASSES, "COSTS": READ_COSTS, "LONG": 300 * "n"}
    words = arguments.split() if isinstance(arguments, str) else arguments
    for name, meaning in names.items():
        words = [word.replace(name, meaning) for word in words]
    return [part for word in words for part in (word.split() or [word])]


def refuse(arguments: str | list[str], phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command that must end with code 2, the phrase on standard error, and no change of the folder."""
    before = contents(folder)
    code = main(split(arguments))
    error = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().err)
    assert code == 2, error
    assert phrase in error
    assert "Traceback" not in error
    assert contents(folder) == before
