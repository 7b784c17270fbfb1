"""Conversations become tokens, tokens train a model with published weights, and the run is resumed where it stopped."""

import json
import shutil
from pathlib import Path

import golden
import pytest

from meshpipe.cli import main

RECIPE = """
from dataclasses import replace
from recipes.language_model import debug
from meshpipe.data import PreparedConfig
from meshpipe.weights import model_of

def tuned():
    return replace(debug(), model=model_of("weights"), data=PreparedConfig(path="prepared"), batch_size=8)
"""


@pytest.mark.slow
def test_a_run_on_prepared_conversations_continues_with_the_same_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(golden.FOLDER / "llama3", "weights")
    Path("recipe.py").write_text(RECIPE)
    with Path("chats.jsonl").open("w") as file:
        for number in range(300):
            question, answer = f"What comes after {number}?", f"It is {number + 1}."
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(f"{json.dumps({'messages': chat})}\n")
    prepare = "data prepare chats.jsonl --tokenizer weights --to prepared --sequence-length 64 --held-out 0.1"
    assert main(prepare.split()) == 0
    train = "train recipe.py:tuned --learning-rate 0.03 --decay constant"
    for folder, steps, more in (
        ("whole", 16, "--init-from weights"),
        ("stopped", 7, "--init-from weights"),
        ("stopped", 16, "--resume"),
    ):
        assert main(f"{train} --steps {steps} --run-dir {folder} {more}".split()) == 0, capsys.readouterr().err
    losses = _losses("whole")
    assert _losses("stopped") == losses
    assert losses[16] < 0.8 * losses[1]


def _losses(folder: str) -> dict[int, float]:
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
