"""Several processes generate what `transformers` does; each has the tokens, and only its own stages."""

import json
from pathlib import Path

import golden
import pytest
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
    expected = {name: golden.expected(name)["continuation"].tolist() for name in names}
    assert [json.loads(line.removeprefix("RESULT ")) for line in lines] == [expected] * count, ended
