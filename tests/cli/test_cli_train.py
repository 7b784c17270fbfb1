"""Training as users run it: processes with exit codes, output, metrics files and checkpoints."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from waiting import LONG

ROOT = Path(__file__).resolve().parents[2]
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
TIMEOUT = LONG
"""Time-out of a process in seconds; CI machines can be slow."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    error: str

    def __str__(self) -> str:
        return f"exit code {self.code}\n--- standard output\n{self.out}\n--- standard error\n{self.error}"


@dataclass(frozen=True)
class Workplace:
    """The current folder, and a compile cache shared by later processes."""

    folder: Path

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        environment = {name: value for name, value in os.environ.items() if name not in ("NPROC", "JAX_PLATFORMS")}
        environment |= {
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "meshpipe", *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: "subprocess.Popen[str]") -> Result:
        try:
            out, error = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, error = process.communicate()
            pytest.fail(f"{process.args} did not end within {TIMEOUT} s\n{Result(-1, out, error)}")
        return Result(process.returncode, out, error)

    def run(self, *arguments: str) -> Result:
        return self.finish(self.start(*arguments))

    def train(self, *flags: str, code: int = 0) -> Result:
        result = self.run("train", TINY, *flags)
        assert result.code == code, result
        return result

    def events(self, name: str, kind: str | None = None) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / name).read_text().splitlines()]
        return [line for line in lines if kind in (None, line["event"])]

    def losses(self, name: str) -> dict[int, float]:
        """The loss of each step; for a repeated step, the last one."""
        return {line["step"]: line["loss"] for line in self.events(name, "step")}

    def wait_until(self, process: "subprocess.Popen[str]", condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"{process.args} ended or waited too long\n{self.finish(process)}")
            time.sleep(0.005)

    def has_steps(self, name: str, count: int) -> Callable[[], bool]:
        path = self.folder / name
        return lambda: path.exists() and path.read_text().count('"event": "step"') >= count

    def checkpoints(self, name: str) -> list[int]:
        """The steps that `checkpoint list` shows."""
        result = self.run("checkpoint", "list", name)
        assert result.code == 0, result
        return [
            int(line.split()[0]) for line in result.out.splitlines() if line.split()[:1] and line.split()[0].isdigit()
        ]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return Workplace(tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="module")
def whole(workplace: Workplace) -> Result:
    """An uninterrupted run of 12 steps."""
    flags = "--steps 12 --metrics whole.jsonl --eval-every 5 --checkpoint-dir whole --checkpoint-every 4 "
    flags += "--measure-every 6 --trace whole.json"
    return workplace.train(*flags.split())


@pytest.fixture(scope="module")
def stopped(workplace: Workplace) -> Result:
    """An endless run, stopped by SIGTERM."""
    flags = "--steps 1000000 --metrics stopped.jsonl --checkpoint-dir stopped --eval-batches 0"
    process = workplace.start("train", TINY, *flags.split())
    workplace.wait_until(process, workplace.has_steps("stopped.jsonl", 5))
    process.send_signal(signal.SIGTERM)
    return workplace.finish(process)


def test_the_output_of_a_run(whole: Result) -> None:
    # On a slow machine, phases say that they take over two seconds.
    phase = re.compile(r"[A-Z][a-z]+ing.*( \.\.\.| took [\d.]+ s\.|, \d+ s)")
    lines = [line for line in whole.out.splitlines() if not phase.fullmatch(line)]
    assert whole.error == "", whole  # libraries keep quiet
    assert lines[0] == "No accelerator: running on 2 virtual CPU devices."
    assert "pipeline 2 x data 1 x tensor 1 = 2 cpu devices" in lines[1]
    assert lines[2] == "stages: 0 (rank 0) layers 0-1  1 (rank 1) layers 2-3"
    assert lines[3].startswith("1f1b, 4 microbatches of 4 examples, remat none")
    assert lines[4] == "Training all 8 arrays, 288 parameters."
    assert lines[5].startswith("Compiled and initialised in ")
    assert lines[6].startswith("step 1/12  loss ")
    assert lines[-1].startswith("Completed after step 12 of 12; loss ")
    assert lines[-1].endswith("Step 12 is saved in whole.")


def test_the_metrics_file_covers_the_whole_run(whole: Result, workplace: Workplace) -> None:
    start, *middle, end = workplace.events("whole.jsonl")
    assert start["event"] == "start"
    assert start["step"] == 0
    assert start["layout"] | {"pipeline": 2, "data": 1, "tensor": 1, "schedule": "1f1b"} == start["layout"]
    assert start["devices"] == ["cpu:0", "cpu:1"]
    assert start["versions"].keys() >= {"meshpipe", "jax", "flax", "python"}
    assert start["config"]["steps"] == 12
    assert start["config"]["model"] == {"type": "DenseConfig", "width": 8, "depth": 4}
    assert [line["step"] for line in middle if line["event"] == "step"] == list(range(1, 13))
    assert [line["step"] for line in middle if line["event"] == "eval"] == [5, 10, 12]
    for line in middle:
        if line["event"] == "step":
            assert line["loss"] > 0
            assert line["grad_norm"] > 0
            assert line["learning_rate"] == pytest.approx(1e-3)
            assert line["step_time_s"] > 0  # also after a step whose picture was drawn
            assert line["examples_per_s"] == pytest.approx(16 / line["step_time_s"])
            assert ("bubble_fraction" in line) == (line["step"] in (6, 12))
            assert 0 <= line.get("bubble_fraction", 0) < 1
        else:
            assert line["loss"] > 0
    assert end | {"event": "end", "status": "completed", "step": 12} == end


def test_the_trace_has_the_timed_steps(whole: Result, workplace: Workplace) -> None:
    events = json.loads((workplace.folder / "whole.json").read_text())["traceEvents"]
    actions = [e["name"] for e in events if e["ph"] == "X" and e["tid"] == 0 and e["args"]["step"] == 6]
    assert sorted(actions) == sorted(f"{s}{op}{m}" for s in range(2) for op in "FB" for m in range(4))
    assert {e["args"]["step"] for e in events if e["ph"] == "X"} == {6, 12}
    assert (workplace.folder / "whole.png").read_bytes().startswith(b"\x89PNG")


def test_checkpoints_are_saved_as_asked(whole: Result, workplace: Workplace) -> None:
    assert workplace.checkpoints("whole") == [4, 8, 12]


def test_a_resumed_run_reproduces_the_losses(whole: Result, workplace: Workplace) -> None:
    flags = ("--metrics", "parts.jsonl", "--checkpoint-dir", "parts")
    workplace.train(*flags, "--steps", "5")
    result = workplace.train(*flags, "--steps", "12", "--resume")
    assert "Resumed after step 5 of parts." in result.out
    assert workplace.losses("parts.jsonl") == workplace.losses("whole.jsonl")
    assert [line["step"] for line in workplace.events("parts.jsonl", "start")] == [0, 5]
    assert [line["step"] for line in workplace.events("parts.jsonl", "step")] == list(range(1, 13))


def test_a_resumed_run_may_have_another_layout(whole: Result, workplace: Workplace) -> None:
    flags = ("--metrics", "moved.jsonl", "--checkpoint-dir", "moved")
    workplace.train(*flags, "--steps", "5")
    layout = ("--mesh.pipeline", "1", "--mesh.data", "2", "--num-microbatches", "2", "--remat", "full")
    workplace.train(*flags, *layout, "--steps", "12", "--resume")
    assert workplace.losses("moved.jsonl") == pytest.approx(workplace.losses("whole.jsonl"), rel=1e-5)


def test_resuming_a_finished_run_only_prints_a_message(whole: Result, workplace: Workplace) -> None:
    before = (workplace.folder / "whole.jsonl").read_bytes()
    flags = ("--steps", "12", "--metrics", "whole.jsonl", "--checkpoint-dir", "whole")
    result = workplace.train(*flags, "--resume")
    assert "Nothing left to do: whole holds step 12, and --steps is 12." in result.out
    assert (workplace.folder / "whole.jsonl").read_bytes() == before


def test_sigterm_saves_and_gives_143(stopped: Result, workplace: Workplace) -> None:
    assert stopped.code == 143, stopped
    assert "SIGTERM: stopping after the step in progress." in stopped.error
    end = workplace.events("stopped.jsonl")[-1]
    assert (end["event"], end["status"]) == ("end", "stopped")
    assert end["step"] == workplace.events("stopped.jsonl", "step")[-1]["step"] == end["saved_step"]
    assert workplace.checkpoints("stopped") == [end["step"]]
    assert f"Stopped after step {end['step']} of 1000000" in stopped.out


def test_a_stopped_run_resumes_with_the_same_losses(stopped: Result, workplace: Workplace) -> None:
    last = workplace.events("stopped.jsonl")[-1]["step"]
    steps = ("--steps", str(last + 5), "--eval-batches", "0")
    workplace.train(*steps, "--metrics", "stopped.jsonl", "--checkpoint-dir", "stopped", "--resume")
    workplace.train(*steps, "--metrics", "unstopped.jsonl")
    assert workplace.losses("stopped.jsonl") == workplace.losses("unstopped.jsonl")


def test_sigint_gives_130_without_a_folder_to_save_in(workplace: Workplace) -> None:
    process = workplace.start("train", TINY, "--steps", "1000000", "--metrics", "interrupted.jsonl")
    workplace.wait_until(process, workplace.has_steps("interrupted.jsonl", 3))
    process.send_signal(signal.SIGINT)
    result = workplace.finish(process)
    assert result.code == 130, result
    assert result.out.splitlines()[-1].endswith("Nothing was saved.")
    assert workplace.events("interrupted.jsonl")[-1]["status"] == "stopped"


def test_a_second_sigint_ends_at_once(workplace: Workplace) -> None:
    process = workplace.start("train", TINY, "--data.gate", "never", "--metrics", "waiting.jsonl", "--steps", "1000000")
    workplace.wait_until(process, workplace.has_steps("waiting.jsonl", 1))
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert process.stderr.readline().startswith("SIGINT: stopping after the step in progress.")
    assert process.poll() is None  # it waits for its data, and would end after this step
    process.send_signal(signal.SIGINT)
    result = workplace.finish(process)
    assert result.code == 130, result
    assert workplace.events("waiting.jsonl")[-1]["event"] == "step"


def test_a_non_finite_run_fails_and_names_the_place(workplace: Workplace) -> None:
    flags = "--metrics poisoned.jsonl --checkpoint-dir poisoned --checkpoint-every 1 --steps 40 --data.poisoned 17"
    result = workplace.train(*flags.split(), code=1)
    end = workplace.events("poisoned.jsonl")[-1]
    assert (end["status"], end["saved_step"]) == ("failed", end["step"])
    *_, failure, saved = result.error.splitlines()
    assert failure.startswith(f"meshpipe: the run failed: Step {end['step'] + 1} is not finite")
    assert "microbatch" in failure
    assert saved == f"Step {end['step']} is saved in poisoned; resume from it with --resume."
    assert "Traceback" not in result.error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_run_continues_when_metrics_cannot_be_written(workplace: Workplace) -> None:
    result = workplace.train("--metrics", "/dev/full", "--checkpoint-dir", "full")
    assert result.error.count("No space left on device") == 1
    assert result.out.splitlines()[-1].endswith("Step 6 is saved in full.")


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_killed_during_a_save_the_newest_listed_step_is_whole(workplace: Workplace, attempt: int) -> None:
    name = f"killed{attempt}"
    flags = ("--metrics", f"{name}.jsonl", "--checkpoint-dir", name, "--eval-batches", "0", "--model.depth", "8")
    process = workplace.start("train", TINY, *flags, "--steps", "1000000", "--checkpoint-every", "1")
    folder = workplace.folder / name
    workplace.wait_until(process, lambda: folder.exists() and any(p.name.isdigit() for p in folder.iterdir()))
    workplace.wait_until(process, lambda: any("partial" in path.name for path in folder.iterdir()))
    process.kill()
    assert workplace.finish(process).code == -signal.SIGKILL
    newest = workplace.checkpoints(name)[-1]
    assert workplace.run("checkpoint", "verify", name).code == 0
    steps = ("--steps", str(newest + 3))
    workplace.train(*flags, *steps, "--resume")
    workplace.train(*steps, "--metrics", f"{name}-whole.jsonl", "--eval-batches", "0", "--model.depth", "8")
    assert workplace.losses(f"{name}.jsonl") == workplace.losses(f"{name}-whole.jsonl")
