"""What the processes of a command compare before anything is compiled."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_recipes

from meshpipe.checkpoint import CheckpointConfig
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.runs.settings import describe_config, describe_source

CONFIG = tiny_recipes.pipeline()


@pytest.mark.parametrize(
    ("other", "flags"),
    [
        ({"steps": 7}, {"--steps"}),
        ({"optimizer": OptimizerConfig(learning_rate=0.5, clip_norm=1.0)}, {"--learning-rate", "--clip-norm"}),
        ({"data": replace(CONFIG.data, count=100)}, {"--data.count"}),
        ({"eval_batches": 0}, {"--eval-batches"}),
        ({"checkpoint": CheckpointConfig(checkpoint_dir="a")}, {"--checkpoint-dir"}),
        ({"trace": "trace.json"}, {"--trace"}),
        ({"pipeline": replace(CONFIG.pipeline, partition="0,1")}, {"--partition"}),
        ({"metrics": "metrics.jsonl", "compile_cache": None}, set()),
    ],
)
def test_settings_are_named_by_their_flags(other: dict[str, Any], flags: set[str]) -> None:
    usual, found = describe_config(CONFIG), describe_config(replace(CONFIG, **other))
    assert {name for name in usual if usual[name] != found[name]} == flags


def test_folders_may_have_another_path_on_each_machine() -> None:
    here, there = (replace(CONFIG, checkpoint=CheckpointConfig(checkpoint_dir=path)) for path in ("/a", "/b"))
    assert describe_config(here) == describe_config(there)


def test_data_of_the_same_name_and_length_is_told_apart() -> None:
    class Rows:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"inputs": np.full(2, index * self.factor)}

    described = [describe_source("training", Rows(factor)) for factor in (1.0, 1.0, 2.0)]
    assert described[0] == described[1], "the address of an object does not count"
    differ = {name for name, value in described[2].items() if value != described[0][name]}
    assert differ == {"examples of the training data"}
    assert describe_source("held-out", None) == {}
