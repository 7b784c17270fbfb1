"""The tasks of lm-evaluation-harness, where it is installed: its requests, and a task of its own from begin to end."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("lm_eval")
pytest.importorskip("tokenizers")

from meshpipe.data.tokenizer import Tokenizer
from meshpipe.generation.harness import MeshpipeLM

FOLDER = golden.FOLDER / "qwen2"
TASK = """
task: numbers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.fixture(scope="module")
def lm() -> MeshpipeLM:
    assert len(jax.devices()) >= 2  # all devices of the tests, before the model asks for its own
    return MeshpipeLM(str(FOLDER), pipeline=2, batch_size=4, max_length=12)


@nnx.jit
def call(layers: list[nnx.Module], inputs: jax.Array) -> jax.Array:
    x: Any = inputs
    for layer in layers:
        x = layer(x)
    return jax.nn.log_softmax(x[0])


def logprobs(tokens: list[int]) -> np.ndarray:
    """Of every token, after all before it, by the layers one after the other."""
    return np.asarray(call(golden.modules("qwen2"), jnp.asarray([tokens + [0] * (16 - len(tokens))])))[: len(tokens)]


@pytest.mark.slow
def test_loglikelihood(lm: MeshpipeLM) -> None:
    tokenizer = Tokenizer(FOLDER)
    pairs = (("say", " so"), ("and ", "no"), ("", "yes"))
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (logprob, is_greedy) in zip(pairs, found, strict=True):
        tokens = tokenizer.encode(context.rstrip()) if context else [tokenizer.end]
        begin = len(tokens)
        tokens = tokenizer.encode(context + continuation) if context else [*tokens, *tokenizer.encode(continuation)]
        every = logprobs(tokens)
        assert logprob == pytest.approx(
            sum(float(every[i - 1, tokens[i]]) for i in range(begin, len(tokens))), abs=1e-4
        )
        assert is_greedy == all(int(every[i - 1].argmax()) == tokens[i] for i in range(begin, len(tokens)))


@pytest.mark.slow
def test_rolling_windows_score_every_token_once(lm: MeshpipeLM) -> None:
    text = "so they say and say so again and no more of"
    tokens = lm.tokenizer.encode(text)
    assert 2 * lm.max_length < len(tokens) < 3 * lm.max_length
    (found,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    wanted, before = 0.0, [lm.prefix_token_id, *tokens]
    for end in (12, 24, len(tokens)):  # each window begins as early as it may
        begin = max(0, end - 12)
        every = logprobs(before[begin:end])
        wanted += sum(float(every[i - begin, tokens[i]]) for i in range(begin if end < len(tokens) else 24, end))
    assert found == pytest.approx(wanted, abs=1e-3)


@pytest.mark.slow
def test_generation_ends_at_a_text(lm: MeshpipeLM) -> None:
    settings = {"max_gen_toks": 6, "until": []}
    (whole,) = lm.generate_until(requests(("say", settings)), disable_tqdm=True)
    stop = whole[3:5]
    assert stop
    several = requests(("say", settings), ("say", {"max_gen_toks": 6, "until": stop}), ("no", settings))
    found = lm.generate_until(several, disable_tqdm=True)
    assert found[:2] == [whole, whole[: whole.index(stop)]]
    with pytest.raises(ValueError, match="generates with num_beams"):
        lm.generate_until(requests(("say", {"num_beams": 3})), disable_tqdm=True)


@pytest.mark.slow
def test_conversations_are_written_with_the_template(lm: MeshpipeLM) -> None:
    template = Tokenizer(FOLDER).template()
    assert template is not None
    said = [{"role": "user", "content": "so?"}]
    assert lm.apply_chat_template(said) == template.render(said, prompt=True)
    assert lm.chat_template(True) == template.source


@pytest.mark.slow
def test_a_task_runs(lm: MeshpipeLM, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [{"question": f"{n} is", "choices": [" odd", " even"], "answer": n % 2} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "numbers.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.jsonl")))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(model=lm, tasks=["numbers"], task_manager=tasks, bootstrap_iters=0)
    scores = lm.loglikelihood(requests(*((r["question"], c) for r in rows for c in r["choices"])), disable_tqdm=True)
    best = [int(scores[2 * n + 1][0] > scores[2 * n][0]) for n in range(6)]
    wanted = sum(chosen == row["answer"] for chosen, row in zip(best, rows, strict=True)) / 6
    assert math.isclose(results["results"]["numbers"]["acc,none"], wanted)


def test_what_it_cannot_do_says_so() -> None:
    for message, arguments in {
        "without a search. Got 'auto'": {"batch_size": "auto"},
        "which has none of them": {"pretrained": "missing"},
    }.items():
        with pytest.raises(ValueError, match=message):
            MeshpipeLM(**{"pretrained": str(FOLDER)} | arguments)
