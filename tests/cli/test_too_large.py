"""A model that is too large for the machine, trained as a user would: an error within seconds, and no memory taken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LONG, processor_seconds_of_ended

ROOT = Path(__file__).resolve().parents[2]
TINY = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"
LIMIT = 24 << 30
"""Bytes of address space: JAX by itself takes a few GB of it."""
WIDE = ("--model.width", "30000", "--data.width", "30000")
"""Four layers of 900 million parameters: with gradients and two moments, 57.6 GB."""


def run(folder: Path, *arguments: str, limit: int = LIMIT) -> tuple[subprocess.CompletedProcess[str], float]:
    """The result under a limit on the address space, and the seconds of a processor that it took."""
    before = processor_seconds_of_ended()
    result = subprocess.run(
        ["sh", "-c", f'ulimit -v {limit // 1024}; exec "$@"', "sh", sys.executable, "-m", "meshpipe", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    return result, processor_seconds_of_ended() - before


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
    assert seconds < 60, result  # it imports, and looks at shapes


@pytest.mark.slow
def test_evaluation_and_generation_beyond_memory_end_with_the_way_out(tmp_path: Path) -> None:
    language = f"{ROOT / 'recipes' / 'language_model.py'}:debug"
    (tmp_path / "long.txt").write_text("to be or not to be\n" * 40_000)
    trained, _ = run(tmp_path, "train", language, "--steps", "1", "--run-dir", "run", "--eval-batches", "0")
    assert trained.returncode == 0, trained
    windows = ("--sequence-length", "65536", "--batch-size", "8")
    evaluated, _ = run(tmp_path, "eval", "run", "--data", "long.txt", *windows)
    assert evaluated.returncode == 2, evaluated
    assert "RESOURCE_EXHAUSTED: " in evaluated.stderr, evaluated
    assert "or make the mesh larger (--mesh.pipeline, --mesh.tensor)." in evaluated.stderr, evaluated
    (tmp_path / "prompts.txt").write_text("to be\n" * 64)
    many = ("--prompts", "prompts.txt", "--batch-size", "64", "--max-tokens", "16000000")
    generated, seconds = run(tmp_path, "generate", "run", *many)
    assert generated.returncode == 2, generated
    assert "meshpipe: The keys and values of all texts in progress must fit into the memory" in generated.stderr
    assert "Lower --max-tokens, --batch-size or --in-flight, or shorten the prompts." in generated.stderr, generated
    assert seconds < 60, generated  # it imports and reads weights
    for result in (evaluated, generated):
        assert "Traceback" not in result.stderr, result
        assert not result.stdout, result


def test_a_model_that_fits_runs_under_the_limit(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "train", TINY, "--steps", "1", "--eval-batches", "0")
    assert result.returncode == 0, result
