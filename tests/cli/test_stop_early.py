"""Signals at random moments of the start-up of a real run: it ends within two seconds, and leaves nothing behind."""

import os
import pty
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
SAVED = ("--run-dir", "runs/mine", "--checkpoint-every", "1", "--steps", "1000000")
SLOW = ("train", f"{ROOT / 'recipes' / 'language_model.py'}:pipeline", *SAVED)
"""It compiles for five seconds at least."""
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SECONDS = 2.0
BUSY = 1.0
"""What a machine may take longer that has other work to do."""


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
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        (caught,) = (x for x in Path(f"/proc/{process.pid}/status").read_text().splitlines() if x.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1:
            return
        time.sleep(0.01)
    pytest.fail("it never listened to signals")


def end(process: "subprocess.Popen[bytes]", number: signal.Signals) -> tuple[float, str, str]:
    """Sends the signal, and returns the seconds until the end, and what was printed."""
    process.send_signal(number)
    started = time.monotonic()
    try:
        process.wait(30)
    finally:
        process.kill()
    seconds = time.monotonic() - started
    out, error = process.communicate()
    return seconds, (out or b"").decode(), (error or b"").decode()


pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc, to see what is listened to"
)


def check_ended(tmp_path: Path, process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    seconds, out, error = end(process, number)
    report = f"{seconds:.2f} s, exit code {process.returncode}\n--- standard output\n{out}\n--- standard error\n{error}"
    assert process.returncode == STATUS[number], report
    assert seconds < SECONDS + BUSY, report
    assert error.splitlines()[-1] == f"{number.name}: stopped before the first step; nothing was saved.", report
    assert "Traceback" not in error, report
    assert not list(tmp_path.iterdir()), report


def test_a_signal_while_it_imports(tmp_path: Path) -> None:
    process = start(tmp_path, *SLOW)
    wait_until_it_listens(process)
    check_ended(tmp_path, process, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_a_signal_at_a_random_moment(seed: int, tmp_path: Path) -> None:
    """While it imports, examines its layers, traces, compiles or initialises."""
    moment = random.Random(seed)
    process = start(tmp_path, *SLOW)
    wait_until_it_listens(process)
    time.sleep(moment.uniform(0, 6))
    check_ended(tmp_path, process, moment.choice(list(STATUS)))


def test_a_signal_while_it_reads_its_data(tmp_path: Path) -> None:
    """Its first batch never comes; the steps have not begun, but a stop waits for one: a second one does not."""
    process = start(tmp_path, "train", TINY, *SAVED, "--data.seconds", "1000")
    assert process.stdout is not None
    while b"Compiled and initialised in" not in process.stdout.readline():
        assert process.poll() is None
    check_ended(tmp_path, process, signal.SIGTERM)


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_other_commands_end_as_fast(command: str, tmp_path: Path) -> None:
    process = start(tmp_path, command, TINY, "--model.depth", "48")
    wait_until_it_listens(process)
    time.sleep(random.Random(command).uniform(0, 3))
    seconds, out, error = end(process, signal.SIGINT)
    assert (process.returncode, error.splitlines()[-1:]) == (130, ["SIGINT: stopped."]), (out, error)
    assert seconds < SECONDS + BUSY


def test_ctrl_c_on_a_terminal_leaves_it_in_order(tmp_path: Path) -> None:
    main, terminal = pty.openpty()
    process = start(tmp_path, *SLOW, output=terminal)
    os.close(terminal)
    wait_until_it_listens(process)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    started, screen = time.monotonic(), b""
    while time.monotonic() < started + 30:
        try:
            screen += os.read(main, 4096)
        except OSError:  # its other end is closed
            break
    assert process.wait(10) == 130, screen
    assert time.monotonic() - started < SECONDS + BUSY, screen
    assert b"SIGINT: stopped before the first step; nothing was saved." in screen
    assert not list(tmp_path.iterdir())
    assert screen.rfind(b"\x1b[?25h") >= screen.rfind(b"\x1b[?25l"), "the cursor stays hidden"
    assert screen.endswith((b"\n", b"\x1b[2K\x1b[?25h")), "a live line is left"
