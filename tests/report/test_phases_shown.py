"""What a command shows of its phases: nothing of short ones, plain lines in a file, a live line on a terminal."""

import contextlib
import io
import itertools
import os
import pty
import re
import sys
import threading
import time

import pytest
from waiting import wait_until

from meshpipe import phases
from meshpipe.cli.output import lasting_output
from meshpipe.phases import phase
from meshpipe.report import phases as shown
from meshpipe.report.live_line import ERASE, LiveLine
from meshpipe.report.phases import showing_phases
from meshpipe.report.tables import make_console


class Clock:
    """Stands still but for the seconds that a test lets pass while a phase lasts."""

    def __init__(self) -> None:
        self._now = 1.0
        self._looks = 0
        self.sleep = time.sleep

    def monotonic(self) -> float:
        if threading.current_thread().name == "phases":
            self._looks += 1
        return self._now

    def passes(self, seconds: float) -> None:
        """Returns once what is shown then has been written."""
        self._now += seconds
        before = self._looks
        wait_until(lambda: self._looks > before + 1)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (phases, shown):
        monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(shown, "QUIET_SECONDS", 2.0)
    monkeypatch.setattr(shown, "TICK_SECONDS", 0.002)
    monkeypatch.setenv("TERM", "xterm")
    return made


def lines_of(text: str) -> list[str]:
    return text.splitlines()


def test_short_phases_leave_no_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output(say=True) as line, showing_phases(line, on_stderr=False):
        for what in ("Tracing", "Compiling"):
            with phase(what):
                clock.passes(1.9)
    assert capsys.readouterr() == ("", "")


def test_in_a_file_a_long_phase_has_a_line_again_and_again(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output(say=True) as line, showing_phases(line, on_stderr=False), phase("Compiling", "stage", 2) as now:
        clock.passes(2.0)
        now.next()
        for seconds in (9.9, 0.2, 12.0):
            clock.passes(seconds)
    assert lines_of(capsys.readouterr().out) == [
        "Compiling stage 1 of 2 ...",
        "Compiling stage 2 of 2, 12 s",
        "Compiling stage 2 of 2, 24 s",
        "Compiling took 24.1 s.",
    ]


def test_commands_whose_output_is_a_result_say_it_on_standard_error(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with lasting_output(say=False) as line, showing_phases(line, on_stderr=True), phase("Measuring"):
        clock.passes(2.0)
        print("the result")
    out, error = capsys.readouterr()
    assert out == "the result\n"
    assert lines_of(error)[0] == "Measuring ..."


def test_the_inner_phase_is_shown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with lasting_output(say=True) as line, showing_phases(line, on_stderr=False):
        outer = phase("Evaluating").__enter__()
        with phase("Compiling"):
            clock.passes(2.0)
        outer.end()
    assert lines_of(capsys.readouterr().out)[0] == "Compiling ..."


class Terminal:
    """While entered, a terminal is standard output and error; afterwards `screen` has what was written to it."""

    screen = ""

    def __enter__(self) -> "Terminal":
        self._before = sys.stdout, sys.stderr
        self._main, side = pty.openpty()
        sys.stdout = sys.stderr = self._stream = os.fdopen(side, "w", buffering=1)
        return self

    def __exit__(self, *error: object) -> None:
        sys.stdout, sys.stderr = self._before
        self._stream.close()
        screen = b""
        # One read may return only a part. The last one fails, since no one can write any more.
        with contextlib.suppress(OSError):
            while part := os.read(self._main, 1 << 16):
                screen += part
        self.screen = screen.decode()
        os.close(self._main)


def test_on_a_terminal_the_line_is_live_and_gives_way_to_others(clock: Clock) -> None:
    terminal = Terminal()
    with (
        terminal,
        lasting_output(say=True) as line,
        showing_phases(line, on_stderr=False),
        phase("Compiling", "stage", 4) as now,
    ):
        clock.passes(0.4)
        print("a warning")
        now.next()
        clock.passes(2.0)
    screen = terminal.screen
    # The line may be written anew between the warning and the next stage.
    frames = [re.sub(r", \d s$", "", frame) for frame in screen.split("Compiling took")[0].split(ERASE)]
    assert [frame for frame, _ in itertools.groupby(frames) if frame] in (
        ["Compiling stage 1 of 4", "a warning\r\n", "Compiling stage 2 of 4"],
        ["Compiling stage 1 of 4", "a warning\r\n", "Compiling stage 1 of 4", "Compiling stage 2 of 4"],
    )
    assert screen.split("Compiling took")[0].endswith(ERASE)  # and nothing of the live line is left
    assert screen.endswith(" s.\r\n")


def test_a_live_line_is_never_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    terminal = Terminal()
    with terminal, lasting_output(say=True) as line:
        assert line.show("Compiling stage 1 of 1000, 12 s")
    assert terminal.screen == f"{ERASE}Compiling stage 1 o"


def test_lines_of_a_terminal_end_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    terminal = Terminal()
    with terminal, lasting_output(say=True):
        make_console().print("What is printed to a terminal ends between words.")
        print("meshpipe: Errors do so too.\nIn all of their lines, also in the later ones.", file=sys.stderr)
        print("What others say, such as a traceback, stays.", file=sys.stderr)
    assert terminal.screen.split("\r\n") == [
        "What is printed to a terminal ",
        "ends between words.",
        "meshpipe: Errors do so too.",
        "In all of their lines, also in",
        "the later ones.",
        "What others say, such as a traceback, stays.",
        "",
    ]


def test_unfinished_output_of_others_is_never_erased() -> None:
    """Such as a progress bar."""
    with Terminal(), lasting_output(say=True) as line:
        print("step 1 ...", end="")
        assert not line.show("Evaluating, 3 s")
        print("done")
        assert line.show("Evaluating, 3 s")


def test_files_and_dumb_terminals_have_no_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not LiveLine(io.StringIO()).show("Compiling")
    monkeypatch.setenv("TERM", "dumb")
    with Terminal(), lasting_output(say=True) as line:
        assert not line.show("Compiling")
