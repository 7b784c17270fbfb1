"""recipes/finetune.py, and the way of docs/finetuning.md from a folder of weights to text and weights again."""

import re
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


def commands(section: str) -> list[list[str]]:
    """The commands of the first block below a heading, with sizes for a tiny model and few steps."""
    block = re.search(r"```bash\n(.*?)```", DOCS.read_text().split(section, 1)[1], re.DOTALL)
    assert block is not None
    found = []
    for line in block[1].splitlines():
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
        assert words.pop(0) == "meshpipe"
        if words[0] == "train":
            words += f"{FEW} --lora.rank 2 --learning-rate 0.01".split()
        found.append([{"2048": "16"}.get(word, word) for word in words])
    return found


@pytest.mark.slow
def test_from_a_folder_to_text_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    way = commands("# Tuning published weights")
    assert [words[0] for words in way] == ["data", "train", "generate", "weights"]
    for words in way:
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert "Once upon a time" in capsys.readouterr().out
    assert (folder / "tuned-llama/model.safetensors").is_file()
    assert (folder / "tuned-llama/tokenizer.json").is_file()
    export, take = commands("## Adapters of PEFT")
    assert main(export) == 0, capsys.readouterr().err
    (folder / "tuned-adapters").rename(folder / "adapters")
    assert main(take) == 0, capsys.readouterr().err
    tuned, imported = load("tuned"), load("imported")
    assert tuned
    for path, leaf in tuned.items():
        np.testing.assert_array_equal(imported[path], leaf, err_msg=path)
    flags = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Train on: "))
    more = flags.removeprefix("Train on: ").split()
    same = ["train", "finetune:lora", "--data.path", "prepared", *more, "--checkpoint-dir", "on"]
    assert main([*same, *FEW.replace("--steps 1", "--steps 0").split()]) == 0, capsys.readouterr().err
    for path, leaf in load("on").items():
        np.testing.assert_array_equal(leaf, imported[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["full", "full_pipeline", "lora_pipeline"])
def test_layouts(layout: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare, *_ = commands("# Tuning published weights")
    assert main(prepare) == 0, capsys.readouterr().err
    more = "--lora.rank 2" if "lora" in layout else ""
    train = f"finetune:{layout} --init-from Llama-3.2-1B --data.path prepared --checkpoint-dir tuned {more}"
    few = "--steps 1 --batch-size 16 --eval-batches 0"
    assert main(["train", *f"{train} {few}".split()]) == 0, capsys.readouterr().err
    found, base = load("tuned"), golden.leaves("llama3")
    assert found.keys() == base.keys() if "full" in layout else all("/lora/" in path for path in found)
    if "full" in layout:
        assert any((np.asarray(found[path]) != base[path]).any() for path in base)
