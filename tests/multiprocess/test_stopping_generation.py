"""`meshpipe generate` that is asked to stop: texts that have ended are written whole, and nothing else is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import golden
import pytest
from processes import TIMEOUT, environment

QWEN = golden.FOLDER / "qwen2"
NUM_PROMPTS = 20_000


def last_texts(lines: list[str]) -> list[dict[str, object]]:
    """The objects of what `launch` or a process wrote; each must be whole."""
    found = [line.removeprefix("[0] ") for line in lines]
    return [json.loads(line) for line in found if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launch", "number", "status"),
    [((), signal.SIGTERM, 143), (("--processes", "2"), signal.SIGINT, 130)],
    ids=["alone", "launched"],
)
def test_texts_that_have_ended_are_written(
    launch: tuple[str, ...], number: signal.Signals, status: int, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(f"{n} and so") + "\n" for n in range(NUM_PROMPTS)))
    command = ["generate", str(QWEN), "--prompts", str(prompts), "--max-tokens", "9", "--ignore-end", "--json"]
    command += ["--batch-size", "4", "--mesh.pipeline", "2"]
    command = ["launch", *launch, "--", *command] if launch else command
    with open(tmp_path / "out", "w") as out, open(tmp_path / "err", "w") as error:
        process = subprocess.Popen(
            [sys.executable, "-m", "meshpipe", *command], cwd=tmp_path, env=environment(), stdout=out, stderr=error
        )
    try:
        deadline = time.monotonic() + TIMEOUT
        while os.path.getsize(tmp_path / "out") == 0:
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < deadline, (tmp_path / "err").read_text()
            time.sleep(0.05)
        process.send_signal(number)
        code = process.wait(TIMEOUT)
    finally:
        process.kill()
    text, said = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert code == status, text + said
    texts = last_texts(text.splitlines())
    assert 0 < len(texts) < NUM_PROMPTS
    assert all(len(each["tokens"]) == 9 for each in texts)  # type: ignore[arg-type]
    assert [each["prompt"] for each in texts[:2]] == ["0 and so", "1 and so"]
    assert f"Stopped by {number.name}: {len(texts)} of {NUM_PROMPTS} texts had ended, and are written." in said
