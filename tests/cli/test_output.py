"""When standard output becomes unwritable, a run continues, saves, and ends with its own exit code."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from waiting import LONG

from meshpipe.checkpoint import list_checkpoints
from meshpipe.cli import main
from meshpipe.cli.output import lasting_output

ROOT = Path(__file__).resolve().parents[2]
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"


def train(folder: Path, stdout: int, lose: Callable[[], None]) -> tuple[int, str]:
    """The exit code and standard error of a run of 40 steps that loses its output after the first."""
    flags = "--steps 40 --metrics m.jsonl --checkpoint-dir ck --eval-batches 0 --data.gate lost"
    process = subprocess.Popen(
        [sys.executable, "-m", "meshpipe", "train", TINY, *flags.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    os.close(stdout)
    lose()
    (folder / "lost").touch()
    try:
        _, error = process.communicate(timeout=LONG)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"did not end within {LONG} s\n{process.communicate()[1]}")
    return process.returncode, error


def read_until(file: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        part = os.read(file, 4096)
        assert part, seen
        seen += part


def test_a_run_survives_a_reader_that_exits(tmp_path: Path) -> None:
    read, write = os.pipe()

    def lose() -> None:
        read_until(read, b"step 1/40")
        os.close(read)

    code, error = train(tmp_path, write, lose)
    assert (code, list_checkpoints(tmp_path / "ck")) == (0, [40]), error
    assert error == "meshpipe: standard output cannot be written (its reader is gone). The run continues without it.\n"
    assert (tmp_path / "m.jsonl").read_text().count('"event": "step"') == 40


@pytest.mark.slow
def test_a_run_survives_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """With the live progress line, which another thread draws."""
    master, slave = os.openpty()

    def lose() -> None:
        read_until(master, b"1/40")
        os.close(master)

    code, error = train(tmp_path, slave, lose)
    assert (code, list_checkpoints(tmp_path / "ck")) == (0, [40]), error
    assert error.count("The run continues without it.") == 1
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_run_survives_a_full_disk_below_its_output(tmp_path: Path) -> None:
    code, error = train(tmp_path, os.open("/dev/full", os.O_WRONLY), lambda: None)
    assert (code, list_checkpoints(tmp_path / "ck")) == (0, [40]), error
    assert error.count("No space left on device") == 1


def test_characters_that_a_stream_does_not_have_are_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output(say=True):
            print("━ 3")
    assert (tmp_path / "out").read_text() == "? 3\n"


def test_other_commands_end_quietly_without_a_reader(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--help"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_other_commands_fail_without_room_for_their_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--help"]) == 1
    assert capfd.readouterr().err == (
        "meshpipe: standard output cannot be written (No space left on device). The rest of it is lost.\n"
    )
