"""`meshpipe init` copies the recipes that come with meshpipe, overwrites nothing, and leaves nothing half written."""

from pathlib import Path

import pytest

from meshpipe.cli import main
from meshpipe.runs.recipe import find

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(file.name for file in (ROOT / "recipes").glob("*.py"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipes_are_copied_and_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "my work"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"wrote my work/recipes/{name}" for name in NAMES]
    assert lines[-1].endswith("Next: cd 'my work' && meshpipe train text_classifier:pipeline")
    for name in NAMES:
        assert (folder / "my work" / "recipes" / name).read_bytes() == (ROOT / "recipes" / name).read_bytes()
    monkeypatch.chdir(folder / "my work")
    assert find("text_classifier:pipeline").file == Path("recipes/text_classifier.py")
    assert main(["recipes"]) == 0
    assert "come with meshpipe" not in capsys.readouterr().out


def test_the_current_folder_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    assert "Next: meshpipe train" in capsys.readouterr().out
    assert Path("recipes", NAMES[-1]).is_file()


def test_nothing_is_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipes").mkdir()
    Path("recipes", NAMES[-1]).write_text("my own")
    assert main(["init", "."]) == 2
    assert f"overwrites nothing. Got ., where recipes/{NAMES[-1]} exists. " in capsys.readouterr().err
    assert [file.name for file in Path("recipes").iterdir()] == [NAMES[-1]]
    assert Path("recipes", NAMES[-1]).read_text() == "my own"
    Path("recipes", NAMES[-2]).write_text("my own")
    assert main(["init", "."]) == 2
    assert f", recipes/{NAMES[-1]} exist. " in capsys.readouterr().err


def test_other_recipes_stay() -> None:
    Path("recipes").mkdir()
    Path("recipes", "mine.py").write_text("my own")
    assert main(["init"]) == 0
    assert Path("recipes", "mine.py").read_text() == "my own"


@pytest.mark.parametrize("folder_name", ["a_file", "a_file/below"])
def test_a_folder_that_cannot_be_made(folder_name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a_file").touch()
    assert main(["init", folder_name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("meshpipe: ")
    assert "Traceback" not in error
