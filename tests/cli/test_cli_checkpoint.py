"""Checks of checkpoints before the first step of a run."""

import os
from pathlib import Path

import jax
import pytest

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
