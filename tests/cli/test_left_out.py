"""Batches whose updates are left out: their weight is 0, or they are not finite."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from meshpipe.checkpoint import Checkpointer
from meshpipe.cli import main

TINY = Path(__file__).parents[1] / "tiny_recipes.py"
# Two of the four batches of an epoch count nothing: those whose examples come last, in whatever order.
MASKED = """
from tests.tiny_recipes import *

class Masked(Points):
    def __getitem__(self, index):
        return {**super().__getitem__(index), "mask": np.float32(index == 0)}

@dataclass(frozen=True, kw_only=True)
class MaskedData(PointsConfig):
    count: int = 64
    def train_source(self): return Masked(self.count, self.width)
    def eval_source(self): return Masked(64, self.width)

@dataclass(frozen=True, kw_only=True)
class MaskedModel(DenseConfig):
    def loss(self, output, batch):
        losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"]) * batch["mask"]
        return losses.sum(), batch["mask"].sum()

def masked() -> Config: return replace(pipeline(), model=MaskedModel(), data=MaskedData())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert jax.device_count() == 8
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masked.py").write_text(MASKED)
    return tmp_path


def steps_of(folder: Path, name: str = "m.jsonl") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


def test_updates_with_weight_0_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--steps 8 --eval-batches 0 --metrics m.jsonl --checkpoint-dir ck --decay linear"
    assert main(f"train masked.py:masked {flags}".split()) == 0
    captured = capsys.readouterr()
    steps = steps_of(folder)
    left_out = [line["step"] for line in steps if "left_out" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert len(left_out) == 6  # of the four batches of an epoch, one has the point that counts
    for line in steps:
        assert (line.get("left_out"), line["loss"] == 0) in [("weight 0", True), (None, False)], line
    # The optimizer has counted two updates, and its schedule says so.
    rates = [line["learning_rate"] for line in steps if "left_out" not in line]
    assert rates == pytest.approx([1e-3, 1e-3 * 7 / 8])
    assert captured.err.count("is 0 over the whole batch") == 1
    assert "6 updates were left out" in captured.out
    assert Checkpointer("ck").metadata(8)["left_out"] == 6


@pytest.mark.slow
def test_some_non_finite_batches_may_be_skipped(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One point in 64 is not finite, so one batch in each epoch of four is not."""
    command = f"train {TINY}:pipeline --eval-batches 0 --data.count 64 --data.poisoned 3"
    saving = "--metrics m.jsonl --checkpoint-dir ck --checkpoint-every 3"
    assert main(f"{command} --steps 8 {saving} --skip-nonfinite 1".split()) == 1
    captured = capsys.readouterr()
    bad = [line["step"] for line in steps_of(folder) if "left_out" in line]
    assert len(bad) == 1
    assert f"Step {bad[0]} is not finite: batch field 'inputs' is not finite in microbatch" in captured.out
    assert "(1 of 1 by --skip-nonfinite)" in captured.out
    assert "meshpipe: the run failed: Step" in captured.err
    # A resumed run sees the second one again, and skips it.
    assert main(f"{command} --steps 12 {saving} --resume --skip-nonfinite 2".split()) == 0
    capsys.readouterr()
    # A run in which nothing went wrong in between: the same steps, batches and losses.
    assert main(f"{command} --steps 12 --metrics whole.jsonl --skip-nonfinite 3".split()) == 0
    whole = {line["step"]: line for line in steps_of(folder, "whole.jsonl")}
    resumed = {line["step"]: line for line in steps_of(folder)}
    assert list(whole) == list(resumed) == list(range(1, 13))
    assert [whole[step]["loss"] for step in whole] == [resumed[step]["loss"] for step in whole]
    assert len([step for step in whole if whole[step].get("left_out") == "not finite"]) == 3
    state = Checkpointer("ck").metadata(12)
    assert (state["left_out"], state["data"]["examples"]) == (3, 12 * 16)
