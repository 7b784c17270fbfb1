"""Checkpoints of adapters alone, of several processes: they name one base, and are resumed with other processes."""

import json
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT, Ended, run_processes

from meshpipe.checkpoint import Checkpointer

RECIPE = f"{ROOT / 'tests' / 'tiny_recipes.py'}:pipeline"


def train(count: int, folder: Path, flags: str) -> Ended:
    command = ["-m", "meshpipe", "train", RECIPE, "--eval-batches", "0", *flags.split()]
    return run_processes(count, command, folder)


def losses(file: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["event"] == "step"}


@pytest.mark.slow
def test_adapters_are_saved_and_resumed_by_one_process_or_two(tmp_path: Path) -> None:
    for name, seed in (("base", 0), ("other", 9)):
        ended = train(1, tmp_path, f"--steps 2 --seed {seed} --checkpoint-dir {name}")
        assert ended.codes == [0], ended
    tune = "--lora.rank 2 --learning-rate 0.05 --init-from base"
    for count, folder in ((1, "alone"), (2, "together")):
        ended = train(count, tmp_path, f"{tune} --steps 3 --checkpoint-dir {folder} --metrics {folder}.jsonl")
        assert ended.codes == [0] * count, ended
    records = [Checkpointer(tmp_path / folder).metadata(3)["frozen_base"] for folder in ("alone", "together")]
    assert records[0] == records[1]
    leaves = [Checkpointer(tmp_path / folder).leaves(3) for folder in ("alone", "together")]
    assert leaves[0].keys() == leaves[1].keys()
    assert all("/lora/" in key for key in leaves[0] if key.startswith("params/"))
    ended = train(2, tmp_path, f"{tune} --steps 5 --checkpoint-dir alone --resume --metrics alone.jsonl")
    assert ended.codes == [0, 0], ended
    ended = train(1, tmp_path, f"{tune} --steps 5 --checkpoint-dir together --resume --metrics together.jsonl")
    assert ended.codes == [0], ended
    one, two = (losses(tmp_path / name) for name in ("alone.jsonl", "together.jsonl"))
    assert list(one) == list(two) == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-6)
    refused = train(
        2, tmp_path, "--lora.rank 2 --learning-rate 0.05 --steps 7 --checkpoint-dir alone --resume --init-from other"
    )
    assert refused.codes == [2, 2], refused
    assert any("must meet the base that it was trained upon" in log for log in refused.logs), refused


@pytest.mark.slow
def test_two_processes_draw_the_same_base_again(tmp_path: Path) -> None:
    flags = "--lora.rank 2 --checkpoint-dir seeded"
    ended = train(2, tmp_path, f"{flags} --steps 2")
    assert ended.codes == [0, 0], ended
    ended = train(1, tmp_path, f"{flags} --steps 3 --resume --mesh.pipeline 4")
    assert ended.codes == [0], ended
    ended = train(2, tmp_path, f"{flags} --steps 4 --resume")
    assert ended.codes == [0, 0], ended
