"""Checks of checkpoints before the first step of a run, and the commands that look at them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from waiting import LONG

from meshpipe.checkpoint import Checkpointer
from meshpipe.cli import main

RECIPES = Path(__file__).parents[1] / "tiny_recipes.py"


def test_leaf_paths_too_long_to_save_are_found_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert jax.device_count() == 8  # which the command takes as they are
    monkeypatch.chdir(tmp_path)
    flags = "--steps 2 --eval-batches 0 --metrics m.jsonl --checkpoint-dir run"
    assert main(["train", f"{RECIPES}:long_names", *flags.split()]) == 2
    output, error = capsys.readouterr()
    assert "Compiled" not in output
    assert "must have at most 255 bytes, since it names a folder; it has " in error
    assert "Got 'params/layers/0/innerinner" in error
    assert "Rename the attributes" in error
    assert len(error.splitlines()) == 1
    assert os.listdir(tmp_path) == []


SLOW_TO_IMPORT = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "grain", "scipy", "matplotlib"}


@pytest.mark.parametrize("command", ["list", "show", "verify"])
def test_looking_at_checkpoints_imports_nothing_that_takes_seconds(command: str, tmp_path: Path) -> None:
    leaves = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "count": jnp.ones((), jnp.int4)}
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:  # as in a `run_dir`
        checkpointer.save(7, [{"params": leaves}], {"layout": {"pipeline": 1}})
    arguments = [sys.executable, "-X", "importtime", "-m", "meshpipe", "checkpoint", command, str(tmp_path)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=LONG)
    assert ended.returncode == 0, ended.stderr
    assert "7" in ended.stdout
    with_both = [*arguments[:-1], str(tmp_path / "checkpoints" / "7")]
    refused = subprocess.run(with_both, capture_output=True, text=True, timeout=LONG)
    assert (refused.returncode, "a step of it. Pass" in refused.stderr) == (2, True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ended.stderr.splitlines()}
    assert "meshpipe" in imported
    assert not imported & SLOW_TO_IMPORT
