"""A model that is too large for the machine, trained as a user would: an error within seconds, and no memory taken."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
LIMIT = 24 << 30
"""Bytes of address space: JAX by itself takes a few GB of it."""
WIDE = ("--model.width", "30000", "--data.width", "30000")
"""Four layers of 900 million parameters: with gradients and two moments, 57.6 GB."""


def run(folder: Path, *arguments: str, limit: int = LIMIT) -> tuple[subprocess.CompletedProcess[str], float]:
    """The result under a limit on the address space, and the seconds that it took."""
    started = time.monotonic()
    result = subprocess.run(
        ["sh", "-c", f'ulimit -v {limit // 1024}; exec "$@"', "sh", sys.executable, "-m", "meshpipe", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result, time.monotonic() - started


@pytest.mark.parametrize("command", ["train", "verify"])
def test_a_model_that_is_too_large_is_refused(command: str, tmp_path: Path) -> None:
    """Even where its checkpoints are too large for the disk as well."""
    small = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    checkpoints = small / f"meshpipe-{os.getpid()}" / "run"
    flags = ["--checkpoint-dir", str(checkpoints), "--metrics", "m.jsonl"] if command == "train" else []
    result, seconds = run(tmp_path, command, TINY, *WIDE, *flags)
    assert result.returncode == 2, result
    assert "meshpipe: A run must fit into the memory of this machine, which its 2 virtual CPU devices share." in (
        result.stderr
    ), result
    assert " are missing. The largest part is " in result.stderr
    assert "--force runs it all the same." in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.jsonl"))
    assert not checkpoints.parent.exists()
    assert seconds < 60, result  # on a busy machine; it imports, and looks at shapes


def test_a_model_that_fits_runs_under_the_limit(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "train", TINY, "--steps", "1", "--eval-batches", "0")
    assert result.returncode == 0, result
