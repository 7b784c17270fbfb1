"""`meshpipe generate` and `eval`: text and JSON, from published weights and from checkpoints; wrong calls."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshpipe.cli import main
from meshpipe.data import PreparedConfig

ROOT = Path(__file__).parents[2]
LANGUAGE = f"{ROOT / 'recipes' / 'language_model.py'}:debug"
QWEN = golden.FOLDER / "qwen2"


@pytest.fixture(scope="module", autouse=True)
def devices() -> None:
    """All devices of the tests, before a command takes fewer."""
    assert len(jax.devices()) >= 4


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smallest language model, and its metrics."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    assert main(["train", LANGUAGE, "--steps", "3", "--run-dir", str(folder), "--eval-batches", "3"]) == 0
    return folder


@pytest.mark.slow
def test_published_weights_continue_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Hello"\n\n{"prompt": "and\u2028 so"}\r\n', encoding="utf-8-sig")
    flags = ["--prompt", "A", "--prompts", str(prompts), "--max-tokens", "4", "--ignore-end", "--json"]
    assert main(["generate", str(QWEN), *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [line["prompt"] for line in lines] == ["A", "Hello", "and\u2028 so"]
    assert [len(line["tokens"]) for line in lines] == [4, 4, 4]
    assert main(["generate", str(QWEN), "--prompt", "A", "--max-tokens", "4", "--ignore-end"]) == 0
    out, error = capsys.readouterr()
    assert out == f"A{lines[0]['text']}\n"
    assert re.search(r"4 tokens; the first after [\d.]+ s, with compilation, then [\d.]+ tokens/s", error)


@pytest.mark.slow
def test_a_checkpoint_continues_text_and_is_evaluated_as_its_run_does(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    of_run = next(line for line in written if line["event"] == "eval")
    capsys.readouterr()
    for layout in ((), ("--mesh.pipeline", "2", "--mesh.data", "2", "--num-microbatches", "2")):
        assert main(["eval", str(run_folder), "--batches", "3", "--json", *layout]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["examples"] == 96
        for name in ("loss", "accuracy"):
            assert found[name] == pytest.approx(of_run[name], rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-6)
    text = run_folder / "text.txt"
    text.write_text("x = 1\n" * 200)
    assert main(["eval", str(run_folder), "--data", str(text), "--sequence-length", "16", "--batch-size", "5"]) == 0
    assert re.search(r"8 held-out examples: loss [\d.]+  perplexity [\d.]+  accuracy", capsys.readouterr().out)
    drawn = ["--prompt", "def f(", "--max-tokens", "12", "--temperature", "1", "--seed", "5"]
    outputs = []
    for layout in ((), ("--mesh.pipeline", "2", "--mesh.data", "2")):
        assert main(["generate", str(run_folder), *drawn, *layout]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("def f(")


@pytest.mark.slow
def test_published_weights_are_evaluated_on_prepared_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    source, prepared = tmp_path / "lines.jsonl", tmp_path / "prepared"
    source.write_text("".join(json.dumps({"text": f"Line {n} says so to {n * 7 % 13}."}) + "\n" for n in range(40)))
    flags = ["--tokenizer", str(QWEN), "--sequence-length", "16", "--held-out", "0.3"]
    assert main(["data", "prepare", str(source), "--to", str(prepared), *flags]) == 0
    capsys.readouterr()
    # The loss of the layers one after the other.
    examples = PreparedConfig(path=str(prepared)).eval_source()
    batch = {name: np.stack([examples[n][name] for n in range(len(examples))]) for name in examples[0]}
    x: Any = jnp.asarray(batch["inputs"])
    for at, layer in enumerate(golden.modules("qwen2")):
        x = layer(x, jnp.asarray(batch["segment_ids"])) if 0 < at < 3 else layer(x)
    logprobs = np.asarray(jax.nn.log_softmax(x))
    of_targets = np.take_along_axis(logprobs, batch["targets"][..., None], axis=2)[..., 0]
    wanted = -(of_targets * batch["weights"]).sum() / batch["weights"].sum()
    for layout in ((), ("--mesh.pipeline", "2")):
        assert main(["eval", str(QWEN), "--data", str(prepared), "--batch-size", "6", "--json", *layout]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["examples"] == len(examples)
        assert found["loss"] == pytest.approx(wanted, rel=1e-5)


WRONG = {
    "no prompt": ("generate QWEN", "needs at least one --prompt, or a file of --prompts"),
    "no such folder": ("generate missing --prompt a", "which has none of them"),
    "a folder of something else": ("eval EMPTY", "which has none of them"),
    "no tokenizer": ("generate LLAMA --prompt a", "Pass --tokenizer FILE"),
    "a tokenizer that is none": ("generate LLAMA --prompt a --tokenizer EMPTY", "--tokenizer must be a tokenizer.json"),
    "a tokenizer with other tokens": ("generate SMALL --prompt a", "must be the one that the model was trained with"),
    "a step of published weights": ("generate QWEN --prompt a --step 3", "Published weights have no steps"),
    "an empty prompt": ("generate QWEN --prompts EMPTY/empty.jsonl", "must have at least one token"),
    "a line that is no JSON": ("generate QWEN --prompts EMPTY/wrong.jsonl", "wrong.jsonl, line 2"),
    "a line without a prompt": ("generate QWEN --prompts EMPTY/other.jsonl", "an object with a text named prompt"),
    "a conversation without a template": ("generate QWEN --prompts EMPTY/chat.jsonl", "need --chat, which writes them"),
    "a conversation that is none": ("generate QWEN --prompts EMPTY/role.jsonl --chat", "line 1, message 1 has no role"),
    "nothing to stop at": ("generate QWEN --prompt a --stop=", "A --stop must have at least one character"),
    "no file of prompts": ("generate QWEN --prompts EMPTY/missing.txt", "--prompts must name a text file"),
    "cold": ("generate QWEN --prompt a --temperature -1", "--temperature must be a finite number of at least 0. Got "),
    "a share of nothing drawn": ("generate QWEN --prompt a --top-p 0.5", "--top-p has no effect at temperature 0"),
    "a number of nothing drawn": ("generate QWEN --prompt a --top-k 5", "--top-k has no effect at temperature 0"),
    "no such token": ("generate QWEN --prompt a --stop-tokens 9999", "--stop-tokens must be tokens of the model, 0 to"),
    "more than a number of a device": (
        "generate QWEN --prompt a --temperature 1 --top-k 3000000000",
        "--top-k must be",
    ),
    "no text": ("generate QWEN --prompt \udcff", "must be one that UTF-8 can hold"),
    "a number without end": ("generate QWEN --prompts EMPTY/digits.jsonl", "digits.jsonl, line 1"),
    "no share": ("generate QWEN --prompt a --top-p 0", "--top-p must be above 0 and at most 1"),
    "no group": ("generate QWEN --prompt a --batch-size 0", "--batch-size must be at least 1"),
    "more ranks than layers": ("generate QWEN --prompt a --mesh.pipeline 7", "Every stage needs a layer"),
    "no data": ("eval QWEN", "Evaluation needs held-out data"),
    "data that is not prepared": ("eval QWEN --data EMPTY", "must be a folder that `meshpipe data prepare` has made"),
    "a damaged tensor file": ("generate DAMAGED --prompt a", "DAMAGED"),
    "launch of nothing to run": ("launch --processes 2 -- plan RECIPE", "must be one of train, generate, eval"),
    "launch of no folder": ("launch --processes 2 -- generate --prompt a", "A folder comes after generate"),
    "restarts of generation": ("launch --processes 2 --max-restarts 1 -- eval FOLDER", "--max-restarts is for train"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers")
    words, message = WRONG[name]
    empty, small, damaged = tmp_path / "empty", tmp_path / "small", tmp_path / "damaged"
    empty.mkdir()
    (empty / "empty.jsonl").write_text('""\n')
    (empty / "wrong.jsonl").write_text('"a"\n{"prompt": \n')
    (empty / "digits.jsonl").write_text("9" * 5000)
    (empty / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    (empty / "role.jsonl").write_text('{"messages": [{"content": "Hi"}]}\n')
    (empty / "other.jsonl").write_text('{"text": "a"}\n')
    shutil.copytree(QWEN, small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    shutil.copytree(QWEN, damaged)
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[: len(data) // 2])
    places = {
        "QWEN": QWEN,
        "LLAMA": golden.FOLDER / "llama2",
        "EMPTY": empty,
        "SMALL": small,
        "DAMAGED": damaged,
    }
    before = sorted(tmp_path.rglob("*"))
    for word, place in places.items():
        words, message = words.replace(word, str(place)), message.replace(word, str(place))
    assert main(words.split()) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert message in " ".join(error.split()), error
    assert sorted(tmp_path.rglob("*")) == before
