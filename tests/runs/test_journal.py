"""Events reach the metrics file and the trackers; TensorBoard's files are read back."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from event_files import read_events, scalars

from meshpipe.runs.journal import Journal
from meshpipe.runs.metrics import MetricsFile
from meshpipe.runs.trackers import TensorBoard


class Failing:
    """A tracker that fails at its second step."""

    def __init__(self) -> None:
        self.logged: list[int] = []

    def start(self, config: Mapping[str, Any]) -> None: ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            raise ConnectionError("no network")
        self.logged.append(step)

    def end(self, status: str) -> None:
        self.logged.append(-1)


def test_tensorboard_reads_the_values_back(tmp_path: Path) -> None:
    """Of two runs, of which the second continues the first after step 2."""
    for first, last in ((1, 3), (3, 4)):
        tracker = TensorBoard(tmp_path, first - 1)
        tracker.start({"steps": 4})
        journal = Journal(MetricsFile(None), [tracker])
        for step in range(first, last + 1):
            values = {"step": step, "loss": 10.0 * first + step, "left_out": "weight 0", "peak_memory_bytes": [7, 8]}
            journal.write("step", values)
        journal.write("eval", {"step": last, "loss": 0.5, "accuracy": float("nan")})
        journal.end_trackers("completed")
    found = scalars(tmp_path)
    assert {step: value for (tag, step), value in found.items() if tag == "train/loss"} == {1: 11, 2: 12, 3: 33, 4: 34}
    assert found["train/peak_memory_bytes/1", 4] == 8
    assert found["eval/loss", 4] == 0.5
    assert {tag for tag, _ in found} == {
        "train/loss",
        "train/peak_memory_bytes/0",
        "train/peak_memory_bytes/1",
        "eval/loss",
    }
    texts = [
        v.tensor.string_val[0].decode() for e in read_events(tmp_path) for v in e.summary.value if v.tensor.ByteSize()
    ]
    assert '"steps": 4' in texts[0]


def test_a_run_that_begins_again_hides_its_first_attempt(tmp_path: Path) -> None:
    """As one that was killed before its first checkpoint does."""
    for loss, last in ((1.0, 3), (2.0, 1)):
        tracker = TensorBoard(tmp_path, 0)
        tracker.start({})
        for step in range(1, last + 1):
            tracker.log(step, {"train/loss": loss})
        tracker.end("completed")
    assert scalars(tmp_path) == {("train/loss", 1): 2.0}


def test_a_tracker_that_never_logs_writes_nothing(tmp_path: Path) -> None:
    tracker = TensorBoard(tmp_path / "tensorboard", 0)
    tracker.start({})
    tracker.end("failed")
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_fails_is_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker, path = Failing(), tmp_path / "m.jsonl"
    with MetricsFile(path) as file:
        journal = Journal(file, [tracker])
        for step in (1, 2, 3):
            journal.write("step", {"step": step, "loss": 1.0})
        journal.end_trackers("completed")
    assert tracker.logged == [1]
    assert capsys.readouterr().err == "meshpipe: Failing failed: no network. The run continues without it.\n"
    assert len(path.read_text().splitlines()) == 3


def test_events_have_a_time(tmp_path: Path) -> None:
    path, before = tmp_path / "m.jsonl", time.time()
    with MetricsFile(path) as file:
        Journal(file).write("start", {"step": 0})
    assert before - 1 <= json.loads(path.read_text())["time"] <= time.time() + 1  # it may be rounded
