"""A run of Weights & Biases is written offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:single"


@pytest.mark.slow
def test_a_run_is_written_offline_and_continued(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    for flags in (["--steps", "3"], ["--steps", "5", "--resume"]):
        command = [
            "train",
            f"{ROOT / 'tests' / 'tiny_recipes.py'}:single",
            "--run-dir",
            "run",
            "--track",
            "wandb",
            *flags,
        ]
        process = subprocess.run(
            [sys.executable, "-m", "meshpipe", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert process.returncode == 0, process.stdout + process.stderr
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2
    assert len({file.stem for file in runs}) == 1, "the second has the id of the first"
    assert (tmp_path / "run" / "wandb-run.txt").read_text().strip() in runs[0].stem
    for file in runs:
        content = file.read_bytes()
        for name in (b"train/loss", b"eval/loss", b"learning_rate"):
            assert name in content
