"""Recipes are found by name and listed without running them; errors explain what is wrong."""

from pathlib import Path

import pytest

from meshpipe.config import Config
from meshpipe.runs.recipe import RecipeError, discover, find

TINY = Path(__file__).parents[1] / "tiny_recipes.py"

SOURCE = '''"""Layouts of a model."""
from meshpipe.config import Config
from {module} import single as base

def single() -> Config:
    """One device.

    Not on the list.
    """
    return base()

def two_ranks() -> "meshpipe.Config":
    return base()

def _hidden() -> Config:
    return base()

def helper(width: int) -> Config:
    return base()

def optional(width: int = 1) -> Config:
    return base()

def number() -> int:
    return 3

def fails() -> Config:
    raise ValueError("--steps must be at least 0. Got -1.")

unfinished = 1
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with recipes/, in which one file imports its neighbour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "neighbour_of_layouts.py").write_text(TINY.read_text())
    (tmp_path / "recipes" / "layouts.py").write_text(SOURCE.format(module="neighbour_of_layouts"))
    (tmp_path / "recipes" / "_private.py").write_text("raise AssertionError('must not run')")
    return tmp_path


def test_lists_public_functions_that_return_a_config(folder: Path) -> None:
    listed = {recipe.name: recipe.summary for recipe in discover() if recipe.file.stem == "layouts"}
    assert listed == {
        "layouts:single": "One device.",
        "layouts:two_ranks": "",
        "layouts:optional": "",
        "layouts:fails": "",
    }


def test_listing_runs_nothing(folder: Path) -> None:
    (folder / "recipes" / "explosive.py").write_text("raise AssertionError('must not run')\ndef f() -> Config: ...")
    assert "explosive:f" in [recipe.name for recipe in discover()]


@pytest.mark.parametrize(
    "name", ["layouts:single", "recipes/layouts.py:single", "./recipes/layouts.py:single", "recipes/layouts:single"]
)
def test_short_and_long_names_mean_the_same(folder: Path, name: str) -> None:
    recipe = find(name)
    assert recipe.name == "layouts:single"
    assert isinstance(recipe.config(), Config)


def test_a_file_anywhere_is_found_by_its_path(folder: Path) -> None:
    recipe = find(f"{TINY}:pipeline")
    assert recipe.name == f"{TINY}:pipeline"
    assert recipe.config().mesh.pipeline == 2


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("layouts:singel", "Did you mean layouts:single?"),
        ("recipes/layouts.py:singel", "Did you mean layouts:single?"),
        ("layout:single", "Did you mean layouts:single"),
        ("layouts", "Did you mean layouts:single or layouts:two_ranks or layouts:optional or layouts:fails?"),
        ("single", "Did you mean layouts:single or neighbour_of_layouts:single"),
        ("layouts:", "A recipe is FILE.py:FUNCTION, or FILE:FUNCTION."),
        ("elsewhere.py:something_else", "There is no file elsewhere.py"),
        ("layouts:helper", "There is no function helper in recipes/layouts.py."),
        ("layouts:unfinished", "It has single, two_ranks, optional, fails."),
    ],
)
def test_unknown_names_suggest_the_nearest(folder: Path, name: str, phrase: str) -> None:
    with pytest.raises(RecipeError) as error:
        find(name)
    assert phrase in str(error.value)


def test_without_a_folder_those_of_meshpipe_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"text_classifier:pipeline", "language_model:single"} <= {recipe.name for recipe in discover()}
    recipe = find("text_classifier:pipeline")
    assert recipe.name == "text_classifier:pipeline"
    assert recipe.config().mesh.pipeline == 4
    with pytest.raises(RecipeError, match=r"Did you mean text_classifier:pipeline\?"):
        find("recipes/text_classifier.py:pipeline")


def test_a_folder_hides_those_of_meshpipe(folder: Path) -> None:
    assert "text_classifier:pipeline" not in {recipe.name for recipe in discover()}
    with pytest.raises(RecipeError, match="It comes with meshpipe: `meshpipe init DIR` copies it"):
        find("text_classifier:pipeline")


@pytest.mark.parametrize(
    ("source", "phrase"),
    [
        ("def f(:\n", "line 1"),
        ("x = 1\ny = unknown\ndef f(): ...", "fails on line 2: NameError"),
        ("import a_module_that_is_missing\ndef f(): ...", "fails on line 1: ModuleNotFoundError"),
        ("def f():\n    return 3", "A recipe returns a meshpipe.Config. Got int from"),
        ("def f():\n    raise ValueError('no such layout')", "fails on line 2: no such layout"),
    ],
)
def test_a_broken_recipe_is_reported_with_its_line(tmp_path: Path, source: str, phrase: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(source)
    with pytest.raises(RecipeError) as error:
        find(f"{file}:f").config()
    assert phrase in str(error.value)
    assert str(file) in str(error.value)
