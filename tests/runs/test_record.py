"""The metadata of a run can be read back, and decides whether the run can be resumed."""

import functools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_recipes

from meshpipe.checkpoint import CheckpointConfig
from meshpipe.config import Config
from meshpipe.environment import versions
from meshpipe.mesh import MeshConfig
from meshpipe.optimizer.config import OptimizerConfig, matrices
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.runs.continues import check_continues
from meshpipe.runs.find_start import find_start
from meshpipe.runs.record import check_metadata, checkpoint_metadata, config_values, layout_values


def saved(config: Config) -> dict[str, Any]:
    """The metadata of a checkpoint as read from disk."""
    layout = layout_values(config, [range(2), range(2, 4)])
    metadata = checkpoint_metadata(config, "tiny:pipeline", layout, 5, {"examples": 80})
    return json.loads(json.dumps(metadata))


def test_a_config_becomes_nested_values() -> None:
    values = config_values(tiny_recipes.pipeline())
    assert json.loads(json.dumps(values)) == values
    assert values["model"] == {"type": "DenseConfig", "width": 8, "depth": 4}
    assert values["data"]["type"] == "PointsConfig"
    assert values["mesh"] == {"pipeline": 2, "data": 1, "tensor": 1}
    assert values["steps"] == 6


def test_what_json_cannot_hold_is_named() -> None:
    assert config_values({"path": range(2), 3: (1, None)}) == {"path": "range(0, 2)", "3": [1, None]}


def test_the_layout_says_where_stages_begin() -> None:
    layout = layout_values(tiny_recipes.pipeline(), [range(3), range(3, 4)])
    expected = {"pipeline": 2, "schedule": "1f1b", "num_microbatches": 4, "stages_per_rank": 1, "partition": "0,3"}
    assert layout | expected == layout


def test_the_layout_says_what_was_chosen() -> None:
    auto = PipelineConfig(num_microbatches=4, schedule="auto", remat="auto", memory_limit="1GiB")
    config = replace(tiny_recipes.pipeline(), pipeline=auto)
    layout = layout_values(config, [range(3), range(3, 4)], "zb-h1", ("none", "full"))
    assert (layout["schedule"], layout["remat"]) == ("zb-h1", "none,full")
    named = replace(config, pipeline=replace(auto, schedule="gpipe", remat="full", memory_limit=None))
    layout = layout_values(named, [range(3), range(3, 4)], "zb-h1", ("none", "full"))
    assert (layout["schedule"], layout["remat"]) == ("gpipe", "full")


def test_versions_name_the_packages() -> None:
    assert versions().keys() >= {"python", "meshpipe", "jax", "flax", "optax"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mesh": MeshConfig(data=2)},
        {"pipeline": PipelineConfig(num_microbatches=2, remat="full", schedule="gpipe", partition="1")},
        {"steps": 1000, "eval_every": 3, "metrics": "m.jsonl"},
        {"optimizer": OptimizerConfig(learning_rate=1.0, warmup_steps=3, decay="cosine", clip_norm=1.0)},
    ],
)
def test_a_run_resumes_with_another_layout_and_learning_rate(changes: dict[str, Any]) -> None:
    check_continues(replace(tiny_recipes.pipeline(), **changes), saved(tiny_recipes.pipeline()), "runs/a")


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"seed": 3}, "Got 3, and runs/a was saved with 0. Pass `seed` 0"),
        ({"batch_size": 32}, "Got 32, and runs/a was saved with 16. Pass `batch_size` 16"),
        ({"model": tiny_recipes.DenseConfig(depth=5)}, "keep its model. Got depth 5, and runs/a was saved with 4"),
        ({"optimizer": OptimizerConfig(momentum=0.9)}, "keep its optimizer. Got momentum 0.9"),
    ],
)
def test_a_different_run_is_not_resumed(changes: dict[str, Any], phrase: str) -> None:
    with pytest.raises(ValueError, match="A resumed run must keep its") as error:
        check_continues(replace(tiny_recipes.pipeline(), **changes), saved(tiny_recipes.pipeline()), "runs/a")
    assert phrase in str(error.value)


def test_functions_are_described_by_name_not_by_address() -> None:
    found = config_values({"act": matrices, "clip": functools.partial(np.clip, a_min=0), "dtype": np.float32})
    assert found == {
        "act": "meshpipe.optimizer.config.matrices",
        "clip": "numpy.clip(){'a_min': 0}",
        "dtype": str(np.float32),
    }


@pytest.mark.parametrize("step", [4, 10**9, 5.0, "5", None])
def test_metadata_of_another_step_are_refused(step: Any) -> None:
    with pytest.raises(ValueError, match=r"its metadata name step .*Name another step"):
        check_metadata(saved(tiny_recipes.pipeline()) | {"step": step}, 5, "runs/a")


@pytest.mark.parametrize("position", [1.5, -1, True, 10**18, "80", None, [80]])
def test_invalid_data_positions_are_refused(position: Any) -> None:
    for data in ({"examples": position}, {}, position):
        with pytest.raises(ValueError, match="the position in the data is"):
            check_metadata(saved(tiny_recipes.pipeline()) | {"data": data}, 5, "runs/a")


@pytest.mark.parametrize("config", [None, [], "config", {"model": 3}, {"optimizer": ["adam"]}])
def test_an_invalid_config_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match="its config is not the config of a run"):
        check_metadata(saved(tiny_recipes.pipeline()) | {"config": config}, 5, "runs/a")


@pytest.mark.parametrize("left_out", [-1, 6, 0.5, 10**18])
def test_more_updates_left_out_than_there_were_are_refused(left_out: Any) -> None:
    with pytest.raises(ValueError, match="the number of updates left out is"):
        check_metadata(saved(tiny_recipes.pipeline()) | {"left_out": left_out}, 5, "runs/a")


def test_what_a_run_saves_is_accepted() -> None:
    check_metadata(saved(tiny_recipes.pipeline()), 5, "runs/a")


def test_numbers_that_json_does_not_have_are_written_out() -> None:
    assert config_values({"limit": float("inf"), "x": float("nan")}) == {"limit": "inf", "x": "nan"}


def test_a_folder_in_use_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held'); time.sleep(1000)"
    process = subprocess.Popen([sys.executable, "-u", "-c", hold, tmp_path / "writer.lock"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        config = replace(tiny_recipes.pipeline(), checkpoint=CheckpointConfig(checkpoint_dir=str(tmp_path)))
        with pytest.raises(ValueError, match="One run at a time may save to a folder"):
            find_start(config)
    finally:
        process.kill()
        process.communicate()
    assert find_start(config) is None
