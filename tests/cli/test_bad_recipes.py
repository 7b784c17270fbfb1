"""Wrong commands and recipes: refused with one clear message, before anything is compiled or written."""

from pathlib import Path

import pytest

from tests.cli.refused import Call, prepared, refuse

CALLS: dict[str, Call] = {
    "no command": (
        "",
        "The command must be one of recipes, init, train, verify, plan, advise, generate, eval, metrics, launch, "
        "checkpoint, data, weights, doctor. Got none.",
    ),
    "unknown command": ("trian TINY", "Did you mean train?"),
    "no recipe": ("train", "The first argument must be a recipe: meshpipe train RECIPE [flags]. Got none."),
    "flag before the recipe": ("train --steps 3 TINY", "The first argument must be a recipe"),
    "recipe without a function": ("train tiny_recipes", "A recipe is FILE.py:FUNCTION, or FILE:FUNCTION."),
    "recipe of a missing file": ("plan nowhere.py:single", "There is no file nowhere.py"),
    "recipe of a missing function": ("verify TINYs", "Did you mean"),
    "recipe that is not a Config": ("train broken.py:number", "Return a Config from number"),
    "recipe that fails": ("train broken.py:fails", "fails on line 9: no such layout"),
    "recipe that is not Python": ("train notes.txt.py:f", "Correct the file."),
    "layer that fails": (
        "train failing.py:fails --checkpoint-dir new/run --compile-cache new/programs",
        "KeyError: 'labels' This comes from layers/4 (lookup, stage 1), calle",
    ),
    "layer that fails in a plan": (
        "plan failing.py:fails",
        "KeyError: 'labels' This comes from layers/4 (lookup, stage",
    ),
    "layer that fails for a folder that is there": (
        "train failing.py:fails --checkpoint-dir folder --compile-cache folder",
        "KeyError: 'labels' This comes from layers/4 (lookup, stage 1), calle",
    ),
    "layer that cannot be made": (
        "verify failing.py:unbuilt",
        "ZeroDivisionError: division by zero This comes from the constructor of layers/0 (<lambda>).",
    ),
    "output that is not read": (
        "train failing.py:unread --checkpoint-dir new/run --compile-cache new/programs",
        "A named output must be read by name. Got 'memory', the output of layers/1 (Dense), which no layer after it",
    ),
    "output that does not exist yet": (
        "plan failing.py:early",
        "A named output must exist before it is read. layers/4 (<lambda>) reads 'memory', the output of layers/5.",
    ),
    "loss that asks for no output": (
        "verify failing.py:asking",
        "the loss may only require named outputs. Got the parameter 'memory'; no output has a name. Name it",
    ),
    "layers that are a number": ("plan wrong.py:layers", "layers() of a model must return a list. Got 3, of type int."),
    "tied that is a number": ("plan wrong.py:tied", "tied() of a model must return a list. Got 3, of type int."),
    "data that is a number": (
        "train wrong.py:source --data.kind 0",
        "A data source must have __len__ and __getitem__.",
    ),
    "examples that are numbers": ("train wrong.py:source --data.kind 1", "An example must be a dict of arrays by the"),
    "fields without names": ("train wrong.py:source --data.kind 2", "An example must be a dict of arrays by the names"),
    "data of endless length": ("train wrong.py:source --data.kind 3", "A data source must have a length. len() of"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


@pytest.mark.parametrize(("arguments", "phrase"), CALLS.values(), ids=CALLS)
def test_wrong_commands_and_recipes(
    arguments: str | list[str], phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(arguments, phrase, folder, capsys)
