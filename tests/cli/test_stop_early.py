"""Signals at random moments of the start-up of a real run: it ends at once, and leaves nothing behind."""

import contextlib
import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import LONG, has_signal, processor_seconds, processor_seconds_of_ended, wait_until

from meshpipe.report.live_line import ERASE

ROOT = Path(__file__).resolve().parents[2]
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
SAVED = ("--run-dir", "runs/mine", "--checkpoint-every", "1", "--steps", "1000000")
LONG_COMPILE = ("train", TINY, *SAVED, "--model.depth", "48", "--data.gate", "never", "--data.open-for", "8")
"""It compiles for seconds; and its first batch never comes, so that no step begins."""
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SECONDS = 2.0
"""Of each core, from the signal to the end. A timer sees to it that it takes no longer; on a busy machine, time that
the process does not get would count as well."""


def environment(**others: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NPROC", "JAX_PLATFORMS")}
    return kept | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100", "JAX_PLATFORMS": "cpu"} | others


def start(folder: Path, *arguments: str, output: int = subprocess.PIPE) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "meshpipe", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=output, stderr=output, start_new_session=True
    )


def wait_until_it_listens(process: "subprocess.Popen[bytes]") -> None:
    """From here on, but for the first tenth of a second of Python itself, `meshpipe` has the signals."""
    wait_until(lambda: process.poll() is not None or has_signal(process.pid, signal.SIGHUP, "SigCgt"))
    assert process.poll() is None, "it never listened to signals"


def wait_until_it_imports_jax(process: "subprocess.Popen[bytes]") -> None:
    wait_until(lambda: process.poll() is not None or "jaxlib" in Path(f"/proc/{process.pid}/maps").read_text())
    assert process.poll() is None, "it ended before it imported JAX"


def end(process: "subprocess.Popen[bytes]", number: signal.Signals) -> tuple[str, str]:
    """Sends the signal, and returns what was printed; fails if the process still computes."""
    before = processor_seconds_of_ended() + processor_seconds(process.pid)
    process.send_signal(number)
    try:
        process.wait(LONG)
    finally:
        process.kill()
    seconds = processor_seconds_of_ended() - before
    out, error = process.communicate()
    assert seconds < SECONDS * len(os.sched_getaffinity(0)), (seconds, out, error)
    return (out or b"").decode(), (error or b"").decode()


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc, to see what is listened to"
)


def check_ended(tmp_path: Path, process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    out, error = end(process, number)
    report = f"exit code {process.returncode}\n--- standard output\n{out}\n--- standard error\n{error}"
    assert process.returncode == STATUS[number], report
    assert error.splitlines()[-1] == f"{number.name}: stopped before the first step; nothing was saved.", report
    assert "Traceback" not in error, report
    assert not list(tmp_path.iterdir()), report


def test_a_signal_while_it_imports(tmp_path: Path) -> None:
    process = start(tmp_path, *LONG_COMPILE)
    wait_until_it_listens(process)
    check_ended(tmp_path, process, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_signal_at_a_random_moment(seed: int, tmp_path: Path) -> None:
    """While it imports, examines its layers, traces, compiles or initialises."""
    moment = random.Random(seed)
    process = start(tmp_path, *LONG_COMPILE)
    wait_until_it_listens(process)
    time.sleep(moment.uniform(0, 6))
    check_ended(tmp_path, process, moment.choice(list(STATUS)))


def test_a_signal_while_it_reads_its_data(tmp_path: Path) -> None:
    """Its first batch never comes; the steps have not begun, but a stop waits for one: a second one does not."""
    process = start(tmp_path, "train", TINY, *SAVED, "--data.gate", "never", "--data.open-for", "8")
    assert process.stdout is not None
    while b"Compiled and initialised in" not in process.stdout.readline():
        assert process.poll() is None
    check_ended(tmp_path, process, signal.SIGTERM)


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_other_commands_end_as_fast(command: str, tmp_path: Path) -> None:
    process = start(tmp_path, command, TINY, "--model.depth", "48")
    wait_until_it_imports_jax(process)
    out, error = end(process, signal.SIGINT)
    assert (process.returncode, error.splitlines()[-1:]) == (130, ["SIGINT: stopped."]), (out, error)


def test_ctrl_c_on_a_terminal_leaves_it_in_order(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    process = start(tmp_path, *LONG_COMPILE, output=terminal)
    os.close(terminal)
    screen = b""
    while ERASE.encode() not in screen:  # the live line is there
        screen += os.read(main, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # until its other end is closed
        while part := os.read(main, 4096):
            screen += part
    assert process.wait(LONG) == 130, screen
    assert b"SIGINT: stopped before the first step; nothing was saved." in screen
    assert not list(tmp_path.iterdir())
    assert screen.rfind(b"\x1b[?25h") >= screen.rfind(b"\x1b[?25l"), "the cursor stays hidden"
    assert screen.endswith((b"\n", b"\x1b[2K\x1b[?25h")), "a live line is left"
