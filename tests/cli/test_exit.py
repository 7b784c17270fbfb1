"""Recipes, data and layers that call `sys.exit`: never silence, and never exit code 0."""

import json
from pathlib import Path

import jax
import pytest

from meshpipe.cli import main

RECIPES = """
import sys
from tests.tiny_recipes import *

class Ends(Points):
    def __getitem__(self, index):
        if index == 40:
            sys.exit("the data server has gone")
        return super().__getitem__(index)

@dataclass(frozen=True, kw_only=True)
class EndsData(PointsConfig):
    def train_source(self): return Ends(64, self.width)

class EndsLayer(Dense):
    def __call__(self, x):
        sys.exit()

@dataclass(frozen=True, kw_only=True)
class EndsModel(DenseConfig):
    def layers(self): return [lambda rngs: EndsLayer(8, 8, rngs=rngs)] * 2

def text() -> Config: sys.exit("run prepare.sh first")
def number() -> Config: sys.exit(3)
def nothing() -> Config: sys.exit()
def no_exception() -> Config: raise GeneratorExit
def data() -> Config: return replace(pipeline(), data=EndsData())
def layer() -> Config: return replace(pipeline(), model=EndsModel())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert jax.device_count() == 8
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exits.py").write_text(RECIPES)
    (tmp_path / "whole_file.py").write_text("import sys\nsys.exit()\ndef tiny() -> Config: ...\n")
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "phrase"),
    [
        ("exits.py:text", "fails on line 23: it calls sys.exit: run prepare.sh first"),
        ("exits.py:number", "fails on line 24: it calls sys.exit(3)"),
        ("exits.py:nothing", "fails on line 25: it calls sys.exit(None)"),
        ("exits.py:no_exception", "fails on line 26: GeneratorExit"),
        ("whole_file.py:tiny", "The recipe file whole_file.py fails on line 2: it calls sys.exit(None)"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan", "verify"])
def test_a_recipe_that_exits(
    command: str, recipe: str, phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, recipe]) == 2
    assert phrase in capsys.readouterr().err


def test_data_that_exits_fails_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "exits.py:data", "--metrics", "m.jsonl", "--eval-batches", "0", "--steps", "9"]) == 1
    assert "the run failed after step" in (error := capsys.readouterr().err)
    assert "the data server has gone" in error
    end = json.loads((folder / "m.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["status"]) == ("end", "failed")


def test_a_layer_that_exits_is_reported_with_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "exits.py:layer"]) == 1
    error = capsys.readouterr().err
    assert f"plan was ended by sys.exit() in {folder / 'exits.py'}, line 17" in error
