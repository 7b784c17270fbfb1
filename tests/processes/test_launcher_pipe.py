"""Processes end with their launcher, however it ends."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LONG, has_signal, wait_for, wait_until

ROOT = Path(__file__).resolve().parents[2]
QUICK = f"""
import sys, types
for name, folder in (("meshpipe", "meshpipe"), ("meshpipe.cli", "meshpipe/cli")):  # without JAX, which is slow
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = ["{ROOT}/" + folder]
from meshpipe.cli.output import lasting_output
"""
CHILD = """
import signal, time
from pathlib import Path
from meshpipe.processes.launcher_pipe import end_with_launcher
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
end_with_launcher()
Path(f"started-{sys.argv[1]}").touch()
with lasting_output(say=True):
    while not got:
        time.sleep(0.02)
        print("a line of output", flush=True)
        print("another", file=sys.stderr)
Path(f"saved-{sys.argv[1]}").touch()
sys.exit(128 + got[0])
"""
PARENT = """
from meshpipe.processes.launch import Launch
with lasting_output(say=True):
    sys.exit(Launch(2, lambda n, restart: [sys.executable, "child.py", str(n)], max_restarts=2).run())
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "child.py").write_text(QUICK + CHILD)
    (tmp_path / "parent.py").write_text(QUICK + PARENT)
    return tmp_path


def start(folder: Path, output: int, **options: bool) -> "subprocess.Popen[bytes]":
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=folder, stdout=output, stderr=output, **options)
    wait_for(*(folder / f"started-{n}" for n in range(2)))
    return parent


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGHUP, 129), (signal.SIGQUIT, 131), (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)],
)
def test_a_signal_to_the_launcher_makes_all_save_and_end(number: signal.Signals, code: int, folder: Path) -> None:
    reader, writer = os.pipe()
    parent = start(folder, writer)
    os.close(writer)
    os.close(reader)  # nobody reads, as after a terminal was closed
    parent.send_signal(number)
    assert parent.wait(LONG) == code
    wait_for(*(folder / f"saved-{n}" for n in range(2)))


def test_a_closed_terminal_makes_all_save_and_end(folder: Path) -> None:
    terminal, own = pty.openpty()
    script = f"import os, sys; os.setsid(); os.ttyname({own}); os.close(os.open(os.ttyname({own}), os.O_RDWR)); "
    script += "os.execv(sys.executable, [sys.executable, 'parent.py'])"
    parent = subprocess.Popen(
        [sys.executable, "-c", script], cwd=folder, stdin=own, stdout=own, stderr=own, pass_fds=(own,)
    )
    os.close(own)
    os.set_blocking(terminal, False)

    def have_started() -> bool:
        with contextlib.suppress(BlockingIOError):  # what they print has to be read
            os.read(terminal, 10000)
        return all((folder / f"started-{n}").exists() for n in range(2))

    wait_until(have_started)
    os.close(terminal)
    assert parent.wait(LONG) == 129
    wait_for(*(folder / f"saved-{n}" for n in range(2)))


def test_an_ignored_hangup_stays_ignored(folder: Path) -> None:
    """E.g. under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        parent = start(folder, subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert has_signal(parent.pid, signal.SIGHUP, "SigIgn")
    parent.send_signal(signal.SIGHUP)
    assert parent.poll() is None
    parent.terminate()
    assert parent.wait(LONG) == 143
