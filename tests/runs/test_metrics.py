"""Every line of the metrics file is JSON whatever happens."""

import io
import json
import math
import os
import resource
import sys
import threading
from pathlib import Path

import pytest
from waiting import wait_until

from meshpipe.runs.metrics import MetricsFile


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def step(number: int, **more: float) -> dict[str, float]:
    return {"step": number, "loss": 2.5, "step_time_s": 0.5, "examples_per_s": 1234.0} | more


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write("start", {"step": 0})
        metrics.write("step", step(1))
        assert [line["event"] for line in read(path)] == ["start", "step"]


def test_appends_on_resume_and_truncates_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for append, events in ((False, ["a"]), (True, ["a", "b"]), (False, ["c"])):
        with MetricsFile(path, append=append) as metrics:
            metrics.write(events[-1], {})
        assert [line["event"] for line in read(path)] == events


@pytest.mark.parametrize(
    ("before", "after"), [(b'{"event": "a"}\n{"ev', '{"event": "a"}\n'), (b'{"ev', ""), (b"", ""), (b"{}\n", "{}\n")]
)
def test_a_torn_last_line_is_cut_before_appending(tmp_path: Path, before: bytes, after: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(before)
    with MetricsFile(path, append=True) as metrics:
        metrics.write("b", {})
    assert path.read_text() == after + '{"event": "b"}\n'


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write("eval", {"loss": math.nan, "config": {"clip_norm": [math.inf, 1.0]}})
    assert read(path) == [{"event": "eval", "loss": None, "config": {"clip_norm": [None, 1.0]}}]


def test_an_unwritable_line_is_left_out_entirely_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file sizes cuts a write short like a full disk, even for root."""
    path = tmp_path / "m.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsFile(path) as metrics:
        metrics.write("step", {"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        try:
            metrics.write("step", {"step": 2})
            metrics.write("step", {"step": 3})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        metrics.write("step", {"step": 4})
    assert [line["step"] for line in read(path)] == [1, 4]
    error = capsys.readouterr().err
    assert error.count("meshpipe:") == 1
    assert f"a line of the metrics file {path} could not be written: File too large" in error


def test_a_pipe_gets_the_lines_once_somebody_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, said = tmp_path / "pipe", io.StringIO()
    os.mkfifo(pipe)
    monkeypatch.setattr(sys, "stderr", said)

    def write() -> None:
        with MetricsFile(pipe) as file:
            file.write("step", {"step": 1})

    for waits in (True, False):
        reader = -1 if waits else os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        writer = threading.Thread(target=write)
        writer.start()
        if waits:
            wait_until(lambda: "waiting for a program that reads the pipe" in said.getvalue())
        reader = os.open(pipe, os.O_RDONLY) if waits else reader
        writer.join()
        assert os.read(reader, 1000) == b'{"event": "step", "step": 1}\n'
        os.close(reader)


def test_without_a_file_nothing_is_written() -> None:
    with MetricsFile(None) as metrics:
        metrics.write("start", {})


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("missing/m.jsonl", "Create it, or name another file"),
        (".", "Name a file in it"),
        ("old.jsonl", "with `resume`"),
    ],
)
def test_check_refuses_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, phrase: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=phrase):
        MetricsFile.check(name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]


def test_check_accepts_new_empty_and_resumed_files_and_devices(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").touch()
    MetricsFile.check(None)
    MetricsFile.check(tmp_path / "new.jsonl")
    MetricsFile.check(tmp_path / "empty.jsonl")
    MetricsFile.check(tmp_path / "old.jsonl", append=True)
    MetricsFile.check("/dev/null")
