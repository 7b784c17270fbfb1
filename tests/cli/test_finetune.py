"""recipes/finetune.py, and the way of docs/finetuning.md from a folder of weights to text and weights again."""

import re
import shlex
import shutil
from pathlib import Path

import golden
import jax
import numpy as np
import pytest

from meshpipe import load
from meshpipe.cli import main

DOCS = Path(__file__).resolve().parents[2] / "docs" / "finetuning.md"
FEW = "--steps 1 --batch-size 4 --eval-batches 0"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert jax.device_count() == 8  # before a command asks for fewer
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden.FOLDER / "llama3", tmp_path / "Llama-3.2-1B")
    lines = [f'{{"text": "{number} quick brown foxes jump over the lazy dog."}}\n' for number in range(400)]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    return tmp_path


def commands() -> list[list[str]]:
    """The commands of the page in its order, with sizes for a tiny model and few steps."""
    found = []
    for line in re.findall(r"^meshpipe (.*)$", DOCS.read_text(), re.MULTILINE):
        words = shlex.split(line)
        if words[0] == "train":
            words += f"{FEW} --lora.rank 2 --learning-rate 0.01".split()
        found.append([{"2048": "16"}.get(word, word) for word in words])
    return found


@pytest.mark.slow
def test_from_a_folder_to_text_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    way = commands()
    names = ["data", "data", "train", "eval", "generate", "weights", "weights", "weights", "generate"]
    assert [words[0] for words in way] == names
    printed = []
    for words in way:
        assert main(words) == 0, (words, capsys.readouterr().err)
        printed.append(capsys.readouterr().out)
    assert "quick brown foxes" in printed[1]
    assert "held-out examples: loss" in printed[3]
    assert printed[4].startswith("Once upon a time")
    assert printed[8] == printed[4]
    assert (folder / "tuned-llama/model.safetensors").is_file()
    assert (folder / "tuned-llama/tokenizer.json").is_file()
    tuned, imported = load("tuned"), load("imported")
    assert tuned
    for path, leaf in tuned.items():
        np.testing.assert_array_equal(imported[path], leaf, err_msg=path)
    said = next(line for line in printed[7].splitlines() if line.startswith("To train them further: "))
    further = said.removeprefix("To train them further: meshpipe ").split()
    more = f"--data.path prepared --checkpoint-dir on {FEW} --steps 0".split()
    assert main([*further, *more]) == 0, capsys.readouterr().err
    for path, leaf in load("on").items():
        np.testing.assert_array_equal(leaf, imported[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["full", "full_pipeline", "lora_pipeline"])
def test_layouts(layout: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(commands()[0]) == 0, capsys.readouterr().err
    more = "--lora.rank 2" if "lora" in layout else ""
    train = f"finetune:{layout} --init-from Llama-3.2-1B --data.path prepared --checkpoint-dir tuned {more}"
    few = "--steps 1 --batch-size 16 --eval-batches 0"
    assert main(["train", *f"{train} {few}".split()]) == 0, capsys.readouterr().err
    found, base = load("tuned"), golden.leaves("llama3")
    assert found.keys() == base.keys() if "full" in layout else all("/lora/" in path for path in found)
    if "full" in layout:
        assert any((np.asarray(found[path]) != base[path]).any() for path in base)
