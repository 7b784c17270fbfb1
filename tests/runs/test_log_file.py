"""The log of a run has what people see, in plain lines with times."""

import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from waiting import LONG

from meshpipe import phases
from meshpipe.phases import phase
from meshpipe.runs.log_file import LogFile
from meshpipe.runs.progress_line import ProgressLine


def test_the_log_has_what_is_printed_without_the_live_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = 1.0
    monkeypatch.setattr(phases, "time", SimpleNamespace(monotonic=lambda: seconds))
    monkeypatch.setattr("meshpipe.runs.progress_line.SECONDS_BETWEEN_LINES", LONG)
    output, path = io.StringIO(), tmp_path / "log.txt"
    console = Console(file=output, width=60, force_terminal=True)
    with LogFile(console) as log:
        console.print("[bold]before[/bold] the log is open")
        log.open(path)
        line = ProgressLine(console, steps=40)
        for step in range(1, 11):
            line.step({"step": step, "loss": 2.5, "step_time_s": 0.5, "examples_per_s": 1234.0})
        line.say("a line that is much longer than the terminal is wide, and stays whole in the file")
        line.close()
        with phase("Waiting"):
            seconds += 2.0
        with phase("A moment"):
            seconds += 1.9
        print("meshpipe: a warning", file=sys.stderr)
    console.print("after")
    lines = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", text) for text in lines), lines
    texts = [text[21:] for text in lines]
    assert texts[0] == "before the log is open"
    assert [text.split()[1] for text in texts[1:4]] == ["1/40", "5/40", "10/40"]
    assert texts[4:] == [
        "a line that is much longer than the terminal is wide, and stays whole in the file",
        "Waiting took 2.0 s.",
        "meshpipe: a warning",
    ]
    assert "after" in output.getvalue()
    assert capsys.readouterr().err == "meshpipe: a warning\n"


def test_without_open_nothing_is_written(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with LogFile(console):
        console.print("refused")
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = io.StringIO()
    console = Console(file=output)
    with LogFile(console) as log:
        log.open(Path("/dev/full"))
        console.print("one")
        console.print("two")
    assert output.getvalue() == "one\ntwo\n"
    assert capsys.readouterr().err.count("the log could not be written") == 1
