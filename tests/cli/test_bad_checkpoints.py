"""Wrong folders and steps of checkpoints: refused with one clear message, before anything is compiled or written."""

import shutil
from pathlib import Path

import pytest

from meshpipe.cli import main
from tests.cli.refused import TINY, Call, prepared, refuse

CALLS: dict[str, Call] = {
    "checkpoint folder of a long name": ("checkpoint show LONG", "File name too long"),
    "resume without a folder": ("train TINY --resume", "add --checkpoint-dir DIR"),
    "saving without a folder": ("train TINY --checkpoint-every 2", "add --checkpoint-dir DIR"),
    "resume from nothing": (
        "train TINY --resume-from 2 --checkpoint-dir folder",
        "or leave --resume-from out to start a new one",
    ),
    "resume from without a folder": ("train TINY --resume-from 3", "add --checkpoint-dir DIR"),
    "automatic resume without a folder": ("train TINY --auto-resume", "add --checkpoint-dir DIR"),
    "resume from two steps": ("train TINY --resume-from 2 --resume --checkpoint-dir saved", "Leave one of them out"),
    "resume of nothing": ("train TINY --resume --checkpoint-dir folder", "or leave --resume out to start a new one"),
    "resume of a missing folder": ("train TINY --resume --checkpoint-dir missing", "or leave --resume out"),
    "checkpoints into a file": ("train TINY --checkpoint-dir old.jsonl", "Name another folder."),
    "checkpoints below a file": ("train TINY --checkpoint-dir old.jsonl/deep", "Name another folder."),
    "negative number of checkpoints": ("train TINY --checkpoint-dir new --checkpoint-keep -1", "must be at least 0"),
}

# With a folder `saved`, in which a run of four steps has saved steps 2 and 4.
CALLS_WITH_CHECKPOINTS = {
    "new run in the folder of another": ("train TINY --checkpoint-dir saved", "Pass --resume to continue"),
    "another seed": ("train TINY --seed 1 RESUME", "Got 1, and saved was saved with 0. Pass --seed 0"),
    "another batch size": ("train TINY --batch-size 32 RESUME", "Pass --batch-size 16"),
    "another model": ("train TINY --model.depth 3 RESUME", "Got depth 3, and saved was saved with 4."),
    "another optimizer": (
        "train TINY --optimizer sgd RESUME",
        "Got optimizer 'sgd', and saved was saved with 'adamw'.",
    ),
    "other data": ("train TINY --data.count 100 RESUME", "or start a new run"),
    "resume from a step that is not there": (
        "train TINY --resume-from 3 --checkpoint-dir saved",
        "Got 3. Complete steps there: 2, 4.",
    ),
    "no such step": ("checkpoint show saved --step 3", "Complete steps there: 2, 4."),
    "no such step to verify": ("checkpoint verify saved --step 3", "Complete steps there: 2, 4."),
    "step that is no number": ("checkpoint show saved --step last", "--step"),
    "no folder to list": ("checkpoint list missing", "Name the folder that a run saves to."),
    "folder without checkpoints": ("checkpoint list folder", "Name the folder that a run saves to."),
    "no folder named": ("checkpoint list", "Missing"),
    "unknown checkpoint command": ("checkpoint lst saved", "Did you mean list?"),
    "no checkpoint command": ("checkpoint", "The command must be one of list, show, verify. Got none."),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


@pytest.mark.parametrize(("arguments", "phrase"), CALLS.values(), ids=CALLS)
def test_wrong_checkpoints(
    arguments: str | list[str], phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(arguments, phrase, folder, capsys)


@pytest.fixture(scope="module")
def run_of_four_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "saved"
    flags = f"train {TINY} --steps 4 --eval-batches 0 --checkpoint-every 2 --checkpoint-dir {folder}"
    assert main(flags.split()) == 0
    return folder


@pytest.fixture
def saved(run_of_four_steps: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run_of_four_steps, folder / "saved"))


@pytest.mark.parametrize(("arguments", "phrase"), CALLS_WITH_CHECKPOINTS.values(), ids=CALLS_WITH_CHECKPOINTS)
def test_wrong_calls_with_checkpoints(
    arguments: str, phrase: str, saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse(arguments.replace("RESUME", "--resume --checkpoint-dir saved"), phrase, folder, capsys)


def damage(step: Path, item: str) -> None:
    """Flips one bit in the middle of the largest file of an item."""
    file = max((path for path in (step / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("item", ["stage_0", "stage_1", "meta"])
def test_a_damaged_checkpoint_is_not_resumed(
    item: str, saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(saved / "4", item)
    resume = "train TINY --steps 9 --metrics new.jsonl --resume --checkpoint-dir saved"
    refuse(resume, "Pass --resume-from 2, the newest intact step.", folder, capsys)
    assert main(["checkpoint", "verify", "saved"]) == 1
    assert "step 2: every byte is good" in capsys.readouterr().out
    assert main(["checkpoint", "verify", "saved", "--step", "2"]) == 0


def test_a_checkpoint_with_a_missing_file_is_not_resumed(
    saved: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    max(
        (path for path in (saved / "4" / "stage_1").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    ).unlink()
    refuse("train TINY --steps 9 --resume --checkpoint-dir saved", "Pass --resume-from 2", folder, capsys)
