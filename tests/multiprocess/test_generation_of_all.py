"""Several processes generate and score what `transformers` does; each has all of it, and only its own stages."""

import json
from pathlib import Path

import golden
import numpy as np
import pytest
from generate_golden import ENDS
from processes import run_processes

SCRIPT = str(Path(__file__).parent / "generate_golden.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "pipeline", "tensor", "count"),
    [
        (("llama2", "llama3", "mistral", "gpt2"), 2, 1, 2),
        (("qwen2", "qwen3", "gemma2", "gemma3"), 2, 1, 2),
        (("gemma3",), 3, 1, 3),
        (("qwen3",), 2, 2, 4),
    ],
)
def test_tokens_of_several_processes(
    names: tuple[str, ...], pipeline: int, tensor: int, count: int, tmp_path: Path
) -> None:
    ended = run_processes(count, [SCRIPT, ",".join(names), str(pipeline), str(tensor)], tmp_path)
    assert not any(ended.codes), ended
    lines = [line for log in ended.logs for line in log.splitlines() if line.startswith("RESULT ")]
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    assert len(found) == count, ended
    for name in names:
        arrays = golden.expected(name)
        assert [own[name]["tokens"] for own in found] == [arrays["continuation"].tolist()] * count, ended
        whole = arrays["continuation"].tolist()
        prefixes = [row[:end] for row, end in zip(whole, ENDS, strict=True)]  # of which one may begin another text
        followed = [next(row[:end] for end in range(1, 13) if row[:end] in prefixes) for row in whole] * 3
        assert [own[name]["followed"] for own in found] == [followed] * count, ended
        logits, ids = arrays["logits"][:, :-1].astype(np.float64), arrays["ids"][:, 1:]
        logprobs = np.take_along_axis(logits, ids[..., None], axis=2)[..., 0] - np.log(np.exp(logits).sum(axis=2))
        for own in found:
            np.testing.assert_allclose(own[name]["logprobs"], logprobs.sum(axis=1), rtol=0, atol=16 * golden.TOLERANCE)
