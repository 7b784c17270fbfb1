"""Wrong names of files, and files of the wrong content: refused with one clear message."""

from pathlib import Path

import pytest

from tests.cli.refused import Call, prepared, refuse

CALLS: dict[str, Call] = {
    "text that is not there": ("train LANGUAGE --data.path nowhere", "--data.path must name a text file or a folder"),
    "windows longer than the text": ("train LANGUAGE --data.path old.jsonl", "a smaller --data.sequence-length"),
    "attention that these devices lack": ("train LANGUAGE --model.attention cudnn", "--model.attention auto or xla."),
    "heads that do not divide the width": ("train LANGUAGE --model.num-heads 3", "--model.num-heads"),
    "heads that do not divide by tensor": ("plan LANGUAGE --mesh.tensor 4", "Choose a divisor of"),
    "metrics in a missing folder": ("train TINY --metrics missing/m.jsonl", "Create it, or name another file."),
    "compiled programs into a file": (
        "train TINY --compile-cache old.jsonl",
        "--compile-cache must be a writable folder",
    ),
    "verify with programs in a file": (
        "verify TINY --compile-cache old.jsonl",
        "--compile-cache must be a writable folder",
    ),
    **{
        f"{flag} of a name that is too long": (f"{command} TINY {flag} LONG{suffix}", "File name too long")
        for command, flag, suffix in (
            ("train", "--checkpoint-dir", ""),
            ("train", "--metrics", ".jsonl"),
            ("train", "--trace", ".json"),
            ("train", "--compile-cache", ""),
            ("plan", "--plot", ".png"),
            ("plan", "--save-schedule", ".txt"),
            ("plan", "--profile --save-costs", ".json"),
        )
    },
    **{
        f"{flag} without a name": (["train", "TINY", *more.split(), flag, ""], f"{flag} must name a file or folder.")
        for flag, more in (
            ("--checkpoint-dir", ""),
            ("--metrics", ""),
            ("--trace", ""),
            ("--compile-cache", ""),
            ("--costs", "--schedule auto"),
        )
    },
    "text without a name": (["train", "LANGUAGE", "--data.path", ""], "--data.path must name a file or folder."),
    "home of nobody": ("train TINY --metrics ~nobody-of-that-name/m.jsonl", "there is no ~nobody-of-that-name"),
    "trace where nothing can be made": ("train TINY --trace /proc/t.json", "--trace must name a writable file"),
    "plot where nothing can be made": ("plan TINY --plot /proc/t.png", "--plot must name a writable file"),
    "checkpoints where nothing can be made": (
        "train TINY --checkpoint-dir /proc/t/u",
        "writable folder. Got '/proc",
    ),
    "costs of deep nesting": ("plan TINY --schedule auto --costs deep.json", "must name a JSON file of layer costs"),
    "costs that are not finite": ("plan TINY --schedule auto --costs infinite.json", "forward is inf"),
    "costs without end": ("plan TINY --schedule auto --costs /dev/zero", "bytes"),
    "data without a name": ("train unnamed.py:data --checkpoint-dir new", "Give Unnamed a __repr__"),
    "model with an object without a name": ("train unnamed.py:model --checkpoint-dir new", "for extra of the model"),
    "recipe of a long name": ("train LONG.py:f", "File name too long"),
    "metrics into a folder": ("train TINY --metrics folder", "Name a file in it."),
    "metrics over another run": ("train TINY --metrics old.jsonl", "Name another file, remove it"),
    "picture without a format": ("plan TINY --plot picture", "--plot must name a file whose suffix is one of"),
    "picture in a missing folder": ("plan TINY --plot missing/a.png", "a folder that exists"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return prepared(tmp_path, monkeypatch)


@pytest.mark.parametrize(("arguments", "phrase"), CALLS.values(), ids=CALLS)
def test_wrong_files(arguments: str | list[str], phrase: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refuse(arguments, phrase, folder, capsys)
