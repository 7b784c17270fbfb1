"""Wrong calls: one clear message with the way out, exit code 2, no traceback, and nothing written."""

import re
from pathlib import Path

import jax
import pytest

from meshpipe.cli import main

TINY = f"{Path(__file__).parent / 'tiny_recipes.py'}:pipeline"
BROKEN = "def number():\n    return 3\n\ndef fails():\n    raise ValueError('no such layout')\n"

CALLS = {
    # Commands and recipes.
    "no command": ("", "The command must be one of recipes, train, verify, plan, checkpoint. Got none."),
    "unknown command": ("trian TINY", "Did you mean train?"),
    "no recipe": ("train", "A recipe comes first: meshpipe train RECIPE [flags]. Got none."),
    "flag before the recipe": ("train --steps 3 TINY", "A recipe comes first"),
    "recipe without a function": ("train tiny_recipes", "A recipe is FILE.py:FUNCTION, or FILE:FUNCTION."),
    "recipe of a missing file": ("plan nowhere.py:single", "There is no file nowhere.py"),
    "recipe of a missing function": ("verify TINYs", "Did you mean"),
    "recipe that is not a Config": ("train broken.py:number", "Return a Config from number"),
    "recipe that fails": ("train broken.py:fails", "fails on line 5: no such layout"),
    "recipe that is not Python": ("train notes.txt.py:f", "Correct the file."),
    "no recipes folder": ("recipes", "Change to a folder that has it"),
    # Flags.
    "unknown flag": ("train TINY --stepz 3", "Perhaps you meant: --steps"),
    "flag without a value": ("train TINY --steps", "Missing value for argument '--steps'"),
    "flag that is no number": ("train TINY --steps many", "--steps INT"),
    "negative steps": ("train TINY --steps -1", "--steps must be at least 0. Got -1."),
    "negative seed": ("train TINY --seed -1", "--seed must be at least 0. Got -1."),
    "negative evaluation interval": ("train TINY --eval-every -5", "--eval-every must be at least 0. Got -5."),
    "negative learning rate": ("train TINY --learning-rate -1", "must not be negative"),
    "flag of another command": ("train TINY --plot a.png", "Unrecognized options: --plot"),
    # Mesh, batch and microbatches.
    "empty axis": ("train TINY --mesh.pipeline 0", "--mesh.pipeline must be at least 1. Got 0."),
    "more devices than there are": ("train TINY --mesh.tensor 8", "Got 16, with 8 started."),
    "batch that does not divide": ("train TINY --batch-size 10", "The nearest sizes that fit are 8 and 12."),
    "microbatch over data": ("train TINY --mesh.data 3", "must be a multiple of --num-microbatches * --mesh.data"),
    "empty batch": ("train TINY --batch-size 0", "--batch-size must be at least 1. Got 0."),
    "batch larger than the data": ("train TINY --data.count 15", "Pass a smaller --batch-size"),
    "held-out data smaller than a batch": ("train TINY --batch-size 80", "Pass a smaller --batch-size"),
    "no microbatch": ("train TINY --num-microbatches 0", "--num-microbatches must be at least 1. Got 0."),
    # Stages and schedules.
    "more stages than layers": ("train TINY --mesh.pipeline 8", "Use fewer pipeline ranks"),
    "too many boundaries": ("train TINY --boundaries 1 2 3", "Give 1 layer indices, or leave boundaries out"),
    "boundary beyond the layers": ("train TINY --boundaries 9", "Boundaries must ascend strictly between 1 and 3"),
    "boundary that is no number": ("train TINY --boundaries two", "--boundaries"),
    "unknown schedule": ("train TINY --schedule 1f1", "Did you mean 1f1b?"),
    "schedule of one stage per rank": ("train TINY --stages-per-rank 2", "a schedule that takes several: gpipe"),
    "no stage per rank": ("train TINY --stages-per-rank 0", "--stages-per-rank must be at least 1. Got 0."),
    "unknown rematerialisation": ("train TINY --remat some", "--remat must be one of none, full, everything_saveable"),
    # Files.
    "metrics in a missing folder": ("train TINY --metrics missing/m.jsonl", "Make it, or name another file."),
    "metrics into a folder": ("train TINY --metrics folder", "Name a file in it."),
    "metrics over another run": ("train TINY --metrics old.jsonl", "Name another file, remove it"),
    "picture without a format": ("plan TINY --plot picture", "--plot must name a file whose suffix is one of"),
    "picture in a missing folder": ("plan TINY --plot missing/a.png", "a folder that exists"),
    "resume without a folder": ("train TINY --resume", "add --checkpoint-dir DIR"),
    "saving without a folder": ("train TINY --checkpoint-every 2", "add --checkpoint-dir DIR"),
    "resume of nothing": ("train TINY --resume --checkpoint-dir folder", "or leave --resume out to start a new one"),
    "resume of a missing folder": ("train TINY --resume --checkpoint-dir missing", "or leave --resume out"),
    "checkpoints into a file": ("train TINY --checkpoint-dir old.jsonl", "Name another folder."),
    "checkpoints below a file": ("train TINY --checkpoint-dir old.jsonl/deep", "Name another folder."),
    "negative number of checkpoints": ("train TINY --checkpoint-dir new --checkpoint-keep -1", "must be at least 0"),
    "no update to verify": ("verify TINY --updates 0", "--updates must be at least 1. Got 0."),
}


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    """JAX with the devices of the tests, before a command asks for others."""
    assert jax.device_count() == 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("meshpipe.staged_model.compile_stage", must_not_compile)
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.jsonl").write_text('{"event": "end"}\n')
    (tmp_path / "broken.py").write_text(BROKEN)
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


def refuse(arguments: str, phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a command that must end with code 2, the phrase on standard error, and no change of the folder."""
    before = contents(folder)
    code = main(arguments.replace("TINY", TINY).split())
    error = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().err)
    assert code == 2, error
    assert phrase in error
    assert "Traceback" not in error
    assert contents(folder) == before


@pytest.mark.parametrize(("arguments", "phrase"), CALLS.values(), ids=CALLS)
def test_wrong_calls(arguments: str, phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(arguments, phrase, folder, capsys)
