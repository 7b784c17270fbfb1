"""Ctrl-C before a command handles it."""

import os
import subprocess
import sys
from pathlib import Path

from waiting import LONG

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTING = """
import importlib.abc, os, signal, sys

class Interrupt(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "meshpipe.cli.main":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


def interrupted(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program that gets SIGINT while it imports its commands."""
    (folder / "sitecustomize.py").write_text(INTERRUPTING)
    path = os.pathsep.join(map(str, (folder, ROOT)))
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=LONG)


def test_ctrl_c_while_commands_are_imported_ends_without_a_traceback(tmp_path: Path) -> None:
    for arguments in (
        ("-m", "meshpipe", "recipes"),
        ("-c", "import sys; from meshpipe.__main__ import run; sys.exit(run())"),  # as the installed program does
    ):
        ended = interrupted(tmp_path, *arguments)
        assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "SIGINT: stopped.\n"), ended


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    ended = interrupted(
        tmp_path,
        "-c",
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv[1:] = ['--version']; "
        "from meshpipe.__main__ import run; sys.exit(run())",
    )
    assert ended.returncode == 0, ended
    assert ended.stdout.startswith("meshpipe "), ended
