"""What people see on a terminal, by a real one: a pseudo-terminal whose screen is read back."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pyte
import pytest
from waiting import LONG

ROOT = Path(__file__).resolve().parents[2]
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:single"


def screen_after(arguments: list[str], columns: int, folder: Path) -> list[str]:
    """The lines that a command leaves on a terminal of so many columns, those that scrolled away included."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 400, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
    command = [sys.executable, "-m", "meshpipe", *arguments]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    screen = pyte.Screen(columns, 400)
    stream = pyte.ByteStream(screen)
    deadline = time.monotonic() + LONG
    try:
        while time.monotonic() < deadline:
            if not select.select([ours], [], [], 0.2)[0]:
                continue
            try:
                content = os.read(ours, 1 << 16)
            except OSError:  # the command has closed its side
                break
            if not content:
                break
            stream.feed(content)
        lines = [line.rstrip() for line in screen.display if line.strip()]
        assert process.wait(LONG) == 0, "\n".join(lines)
    finally:
        process.kill()
        os.close(ours)
    assert not screen.cursor.hidden
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_the_history_of_the_loss_stays(columns: int, tmp_path: Path) -> None:
    lines = screen_after(["train", TINY, "--steps", "30", "--run-dir", "run"], columns, tmp_path)
    steps = [line.split()[1] for line in lines if line.startswith("step ") and "held out" not in line]
    assert steps == ["1/30", *(f"{n}/30" for n in range(2, 31, 2))]
    assert sum(line.startswith("Completed after step 30 of 30") for line in lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("flag", ["--help", "--help-all"])
def test_help_is_boxes_as_wide_as_the_terminal(columns: int, flag: str, tmp_path: Path) -> None:
    lines = screen_after(["train", TINY, flag], columns, tmp_path)
    boxed = [line for line in lines if line[0] in "│╭╰"]
    assert {len(line) for line in boxed} == {columns}
    assert all(line[-1] in "│╮╯" for line in boxed)
    assert sum(line[0] == "╭" for line in boxed) == sum(line[0] == "╰" for line in boxed)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_recipes_have_whole_names(columns: int, tmp_path: Path) -> None:
    lines = screen_after(["recipes"], columns, tmp_path)
    names = [line.split()[0] for line in lines if line.startswith(("language_model:", "text_classifier:"))]
    assert {"language_model:pipeline_data_tensor", "text_classifier:pipeline_data_tensor"} <= set(names)
    assert all(name.count(":") == 1 for name in names)
    assert len(names) == len(set(names))
    assert any("share its heads, hidden units" in line for line in lines)
