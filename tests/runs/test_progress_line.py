"""The progress line says step, loss, speed and time left, live or in plain lines."""

import io

import pyte
import pytest
from rich.console import Console

from meshpipe.runs.progress_line import ProgressLine, lines_every


def step(number: int, **more: float) -> dict[str, float]:
    return {"step": number, "loss": 2.5, "step_time_s": 0.5, "examples_per_s": 1234.0} | more


def test_plain_lines_come_every_few_steps_and_last() -> None:
    output = io.StringIO()
    progress = ProgressLine(Console(file=output, width=200), steps=42)
    for number in range(1, 43):
        progress.step(step(number))
    progress.close()
    lines = output.getvalue().splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 5, 10, 15, 20, 25, 30, 35, 40, 42]
    assert lines[2] == "step 10/42  loss 2.5000  0.5 s/step  1,234 examples/s  0:00:16 left"


def test_times_of_a_plain_line_are_means_since_the_line_before() -> None:
    """A step that is seen to complete late makes the next one short; the mean of both is right."""
    output = io.StringIO()
    progress = ProgressLine(Console(file=output, width=200), steps=30)
    for number in range(1, 5):
        seconds = 0.0001 if number % 2 else 0.2
        progress.step(step(number, step_time_s=seconds, examples_per_s=100 / seconds))
    *_, line = output.getvalue().splitlines()
    assert "0.1 s/step  1,000 examples/s" in line


def test_throughput_is_in_tokens_if_there_are_tokens() -> None:
    output = io.StringIO()
    ProgressLine(Console(file=output, width=200), steps=1).step(step(1, tokens_per_s=99_000.0))
    assert "99,000 tokens/s" in output.getvalue()


def test_slow_steps_are_not_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1_000_000, 20))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    output = io.StringIO()
    progress = ProgressLine(Console(file=output, width=200), steps=1000)
    for number in range(1, 20):
        progress.step(step(number, step_time_s=20.0))
    assert 5 <= len(output.getvalue().splitlines()) < 19


def test_a_terminal_keeps_the_history_above_a_live_line() -> None:
    output = io.StringIO()
    progress = ProgressLine(Console(file=output, width=100, force_terminal=True), steps=40)
    for number in range(1, 40):
        progress.step(step(number))
    progress.say("held out")
    progress.close()
    screen = pyte.HistoryScreen(100, 50)
    stream = pyte.Stream(screen)
    stream.feed(output.getvalue().replace("\n", "\r\n"))
    lines = [line.rstrip() for line in screen.display if line.strip()]
    assert [line.split()[1] for line in lines if line.startswith("step ")] == [f"{n}/40" for n in (1, *range(5, 40, 5))]
    assert lines[-1] == "held out", "the live line is gone"
    assert "39/40" in output.getvalue(), "it showed every step"
    assert not screen.cursor.hidden


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (15, 1), (16, 2), (60, 5), (100, 10), (1000, 100), (10**6, 100)])
def test_about_fifteen_lines(steps: int, every: int) -> None:
    assert lines_every(steps) == every
