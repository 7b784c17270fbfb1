"""A run as its metrics file tells it, in tables and curves."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from meshpipe.cli import main
from meshpipe.report.curves import smoothed
from meshpipe.report.past_run import UNFINISHED, PastRunError, read_run
from meshpipe.report.run_table import short_names


def start(step: int = 0, steps: int = 20) -> dict[str, Any]:
    return {"event": "start", "step": step, "config": {"steps": steps}}


def steps(first: int, last: int, loss: float = 4.0, **more: float) -> list[dict[str, Any]]:
    rates = {"step_time_s": 0.5, "examples_per_s": 32.0, "grad_norm": 1.0} | more
    return [{"event": "step", "step": n, "loss": loss / n, **rates} for n in range(first, last + 1)]


def end(status: str, step: int) -> dict[str, Any]:
    return {"event": "end", "status": status, "step": step}


def write(file: Path, events: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{e if isinstance(e, str) else json.dumps(e)}\n" for e in events))
    return file


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    """It continued from step 6 after the first part was killed at step 10, and reached step 8."""
    later = steps(7, 8, loss=8.0)
    found = read_run(write(tmp_path / "m.jsonl", [start(), *steps(1, 10), start(6), *later]))
    assert list(found.steps) == list(range(1, 9))
    assert found.values("loss")[6] == pytest.approx(4 / 6)
    assert found.values("loss")[7] == pytest.approx(8 / 7)
    assert found.status == UNFINISHED
    assert found.planned_steps == 20


def test_what_layers_and_metrics_report_has_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Last values of terms and sown values, and of metrics of evaluations."""
    held_out = [{"event": "eval", "step": 2, "loss": 3.0, "accuracy": 0.25, "eval_time_s": 1.0}]
    first = write(tmp_path / "a.jsonl", [start(), *steps(1, 2, balance=0.0125, peak_memory_bytes=7), *held_out])
    second = write(tmp_path / "b.jsonl", [start(), *steps(1, 2, expert_load=12345.0)])
    assert main(["metrics", str(first), str(second)]) == 0
    printed = capsys.readouterr().out
    words = set(printed.split())
    assert {"balance", "accuracy", "expert_load", "0.0125", "0.25", "1.234e+04"} <= words
    assert not {"peak_memory_bytes", "eval_time_s", "grad_norm"} & words


def test_damaged_lines_are_told_with_file_and_line(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.jsonl",
        [
            start(),
            *steps(1, 2),
            "not JSON",
            '{"event": "dance"}',
            "[1]",
            '{"event": "step", "step": "3"}',
            end("failed", 2),
        ],
    )
    with open(file, "ab") as lines:
        lines.write(b'{"event": "st')
    found = read_run(file)
    assert list(found.steps) == [1, 2]
    assert found.status == "failed"
    told = [problem.removeprefix(str(file)) for problem in found.problems]
    assert [problem.split(" is left out")[0] for problem in told] == [f", line {n}" for n in (4, 5, 6, 7, 9)]
    assert "it is no JSON (Expecting value, column 1)" in told[0]
    assert "its event is 'dance'" in told[1]
    assert "it is unfinished" in told[-1]


@pytest.mark.parametrize(
    ("content", "phrase"),
    [("", "has none"), ("garbage\n", "line 1 is left out"), (None, "There is no run at")],
)
def test_a_run_without_steps_is_refused(tmp_path: Path, content: str | None, phrase: str) -> None:
    file = tmp_path / "m.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(PastRunError, match=phrase):
        read_run(file)


def test_values_that_were_not_finite_are_left_out(tmp_path: Path) -> None:
    events = [start(), *steps(1, 3)]
    events[2]["loss"] = None
    assert list(read_run(write(tmp_path / "m.jsonl", events)).values("loss")) == [1, 3]


def test_names_are_as_short_as_tells_them_apart() -> None:
    assert short_names([Path("/runs/a"), Path("/runs/b")]) == ["a", "b"]
    assert short_names([Path("/x/a/m.jsonl"), Path("/x/b/m.jsonl")]) == ["a/m.jsonl", "b/m.jsonl"]


def test_smoothing_is_not_drawn_to_zero_at_the_start() -> None:
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([0.0, 1.0], 0.5) == pytest.approx([0.0, 2 / 3])


@pytest.fixture
def runs(tmp_path: Path) -> list[str]:
    """The folder of a completed run, and the metrics file of one that was killed."""
    evaluation = {"event": "eval", "step": 20, "loss": 0.25}
    tokens = {"tokens_per_s": 27_276.0}
    first = write(
        tmp_path / "a-rather-long-name-of-a-run" / "metrics.jsonl",
        [start(), *steps(1, 20, **tokens), evaluation, end("completed", 20)],
    )
    second = write(tmp_path / "second.jsonl", [start(), *steps(1, 12, loss=5.0, **tokens)])
    return [str(first.parent), str(second)]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_runs_are_compared_in_a_table(
    runs: list[str], columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert main(["metrics", *runs]) == 0
    header, *rows = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, (header, *rows))) <= int(columns)
    kept = ["loss", "best"] if columns == "120" else ["loss"]
    assert header.split()[: 3 + len(kept)] == ["run", "status", "steps", *kept]
    assert ("time" in header) == (columns == "120")
    assert [row.split()[:4] for row in rows] == [
        [Path(runs[0]).name, "completed", "20/20", "0.2000"],
        ["second.jsonl", "unfinished", "12/20", "0.4167"],
    ]
    for row in rows:
        assert "27,276" in row


def test_unreadable_lines_are_reported_and_counted(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with open(runs[1], "a") as lines:
        lines.write("garbage\n" * 8)
    assert main(["metrics", *runs]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    told = captured.err.splitlines()
    assert told[0] == f"meshpipe: {runs[1]}, line 14 is left out: it is no JSON (Expecting value, column 1)."
    assert len(told) == 6
    assert told[-1] == "meshpipe: 3 more lines of second.jsonl could not be read."


def test_curves_are_drawn(runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curves.png"
    assert main(["metrics", *runs, "--plot", str(picture), "--smooth", "0.8"]) == 0
    assert f"Drawn to {picture}." in capsys.readouterr().out
    pixels = matplotlib.image.imread(picture)[..., :3]
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # Matplotlib's first two colours: a curve of each run
        near = abs(pixels * 255 - colour).max(axis=-1) < 12
        assert near.sum() > 500


@pytest.mark.parametrize(
    ("flags", "phrase"),
    [
        ([], "at least one RUN"),
        (["missing.jsonl"], "missing.jsonl"),
        (["RUN", "--smooth", "1.5", "--plot", "a.png"], "--smooth must be"),
        (["RUN", "--smooth", "0.5"], "Add --plot"),
        (["RUN", "--plot", "a.nonsense"], "suffix"),
    ],
)
def test_wrong_requests_are_refused(
    runs: list[str], flags: list[str], phrase: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["metrics", *(runs[0] if flag == "RUN" else flag for flag in flags)]) == 2
    error = capsys.readouterr().err
    assert phrase in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error
