"""Two processes that train on prepared data read what one reads, also after one of them was killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import golden
import pytest
from processes import TIMEOUT, environment, run_processes

from meshpipe.cli import main
from meshpipe.processes.launch import free_port

STEPS, KILLED_AFTER = 40, 8
RECIPE = """
from dataclasses import replace
from recipes.language_model import debug
from meshpipe.data import PreparedConfig
from meshpipe.weights import model_of

def tuned():
    return replace(debug(), model=model_of("weights"), data=PreparedConfig(path="prepared"), batch_size=8)
"""
TRAIN = ["-m", "meshpipe", "train", "recipe.py:tuned", "--steps", str(STEPS), "--learning-rate", "0.01"]
TRAIN += ["--decay", "constant", "--eval-batches", "0", "--checkpoint-every", "3", "--num-microbatches", "4"]


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


def train_until_one_is_killed(folder: Path, command: list[str]) -> str:
    """Kills process 1 of two after some steps; the log of process 0."""
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--process-count", "2", "--process-id"]
    processes = []
    for number in range(2):
        with open(folder / f"killed-{number}.log", "w") as log:
            arguments = [sys.executable, *command, *place, str(number)]
            processes.append(subprocess.Popen(arguments, cwd=folder, env=environment(), stdout=log, stderr=log))
    metrics, deadline = folder / "two" / "metrics.jsonl", time.monotonic() + TIMEOUT
    try:
        while not metrics.exists() or len(metrics.read_text().splitlines()) <= KILLED_AFTER:
            assert time.monotonic() < deadline, (folder / "killed-0.log").read_text()
            time.sleep(0.005)
        processes[1].send_signal(signal.SIGKILL)
        assert processes[0].wait(TIMEOUT) != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return (folder / "killed-0.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["pipeline", "data"])
def test_a_killed_run_of_two_processes_reads_the_tokens_of_one(
    axis: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(golden.FOLDER / "llama3")
    Path("recipe.py").write_text(RECIPE)
    lines = [f"{number} comes after {number - 1}, and {'so ' * (number % 9)}on." for number in range(400)]
    Path("lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    prepare = "data prepare lines.jsonl --tokenizer weights --to prepared --sequence-length 32"
    assert main(prepare.split()) == 0
    layout = [f"--mesh.{axis}", "2"]
    alone = run_processes(1, [*TRAIN, *layout, "--run-dir", "one"], tmp_path)
    assert alone.codes == [0], alone
    log = train_until_one_is_killed(tmp_path, [*TRAIN, *layout, "--run-dir", "two"])
    before = losses(tmp_path / "two")
    assert KILLED_AFTER <= len(before) < STEPS, log
    resumed = run_processes(2, [*TRAIN, *layout, "--run-dir", "two", "--resume"], tmp_path)
    assert resumed.codes == [0, 0], resumed
    found, wanted = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert sorted(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert before == pytest.approx({step: wanted[step] for step in before}, rel=1e-5)
    assert len({f"{loss:.5f}" for loss in wanted.values()}) > STEPS / 2  # other windows would have other losses
