"""Tables and pictures say what they should, in rows that stay whole in a file."""

import io
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_recipes
from flax import nnx
from rich.console import Console
from staged import staged

from meshpipe.checkpoint import CheckpointInfo
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts, Setting
from meshpipe.report.checkpoints import checkpoint_table
from meshpipe.report.plan import layout_lines, print_plan, stage_table
from meshpipe.report.profile import layer_table
from meshpipe.report.tables import format_bytes, make_console
from meshpipe.runs.build import make_chooser


@dataclass(frozen=True)
class Stage:
    index: int
    rank: int
    layers: range
    parameter_count: int
    parameter_bytes: int
    trained_count: int


def rows(table: object) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=200).print(table)
    return [" ".join(line.split()) for line in output.getvalue().splitlines()]


def test_a_checkpoint_is_one_line_of_80_columns() -> None:
    layout = {"pipeline": 4, "data": 2, "tensor": 1, "schedule": "1f1b"}
    metadata = {"recipe": "text_classifier:pipeline_data", "layout": layout}
    saved = [CheckpointInfo(1000, 2_345_000_000, 1e9, metadata, {}), CheckpointInfo(2000, 1500, 1e9, {}, {})]
    output = io.StringIO()
    Console(file=output, width=80).print(checkpoint_table(saved))
    *header, first, second = output.getvalue().splitlines()
    assert max(map(len, (*header, first, second))) <= 80
    assert first.split()[-7:] == ["text_classifier:pipeline_data", "4", "x", "2", "x", "1,", "1f1b"]
    assert second.split()[:3] == ["2000", "1.5", "kB"]


def test_equal_layers_that_follow_each_other_are_one_row() -> None:
    embed, block = (LayerCosts(kind, 1.0, 2.0, 1.0, 1.0, 0.0, 288, 256) for kind in ("Embed", "Block"))
    costs = ModelCosts((embed, block, block, block, embed), Setting(4, 1, 1, "none"), "cpu", 1.0)
    assert [row.split()[:2] for row in rows(layer_table(costs))[1:]] == [
        ["0", "Embed"],
        ["1-3", "Block"],
        ["4", "Embed"],
    ]


def test_stages_are_summed_and_layers_counted() -> None:
    stages = [Stage(0, 0, range(3), 1500, 6000, 1500), Stage(1, 1, range(3, 4), 500, 2_000_000_000, 500)]
    assert rows(stage_table(stages, ["Embed", "Block", "Block", "Head"])) == [
        "stage rank layers kinds parameters bytes",
        "0 0 0-2 Embed, 2 Block 1,500 6 kB",
        "1 1 3 Head 500 2 GB",
        "all 2,000 2 GB",
    ]
    assert rows(stage_table(stages, ["Embed", "Block", "Block", "Head"], ["none", "full"]))[:3] == [
        "stage rank layers kinds parameters bytes remat",
        "0 0 0-2 Embed, 2 Block 1,500 6 kB none",
        "1 1 3 Head 500 2 GB full",
    ]


def test_stages_with_frozen_parameters_say_how_many_are_trained() -> None:
    stages = [Stage(0, 0, range(1), 1500, 6000, 0), Stage(1, 1, range(1, 2), 500, 2000, 40)]
    header, first, second, *_, last = rows(stage_table(stages, ["Embed", "Head"]))
    assert header == "stage rank layers kinds parameters trained bytes"
    assert first == "0 0 0 Embed 1,500 0 6 kB"
    assert second == "1 1 1 Head 500 40 2 kB"
    assert last == "all 2,000 40 8 kB"


def test_the_layout_in_four_lines() -> None:
    assert layout_lines("tiny:pipeline", make_chooser(tiny_recipes.pipeline()).choose()) == [
        "tiny:pipeline: 288 parameters on pipeline 2 x data 1 x tensor 1 = 2 cpu devices",
        "stages: 0 (rank 0) layers 0-1  1 (rank 1) layers 2-3",
        "1f1b, 4 microbatches of 4 examples, remat none, expected bubble 20.0% if stages cost the same",
        "Training all 8 arrays, 288 parameters.",
    ]


def test_the_layout_says_that_there_are_fewer_microbatches_than_ranks() -> None:
    config = replace(tiny_recipes.pipeline(), pipeline=PipelineConfig(num_microbatches=1))
    assert layout_lines("mine", make_chooser(config).choose())[3].endswith("Raise --num-microbatches.")


def test_the_layout_says_which_stages_run_no_backward() -> None:
    lines = layout_lines("mine", make_chooser(replace(tiny_recipes.pipeline(), trainable=("layers/3/*",))).choose())
    assert lines[3] == "Stage 0 runs no backward: nothing is trained there or before."
    assert lines[4].startswith("Training 2 of 8 arrays")


def test_the_layout_says_what_each_stage_computes_again() -> None:
    config = replace(tiny_recipes.pipeline(), pipeline=PipelineConfig(num_microbatches=4, remat="full,none"))
    assert "remat full none, expected" in layout_lines("mine", make_chooser(config).choose())[2]


class Looped(nnx.Module):
    """Two layers in a loop, which computes the gradients of their input and of their parameters at once."""

    def __init__(self, rngs: nnx.Rngs):
        self.kernels = nnx.Param(rngs.params.normal((2, 8, 8)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, self.kernels[...])[0]


def test_a_plan_says_which_backward_cannot_be_split() -> None:
    model = staged(
        Task(
            [lambda rngs: nnx.Linear(8, 8, rngs=rngs), Looped],
            lambda output, batch: (output.sum(), output.size),
            batch={"inputs": np.ones((4, 8), np.float32)},
        ),
        make_mesh(2),
        PipelineConfig(schedule="zb-h1", num_microbatches=2),
    )
    output = io.StringIO()
    print_plan(Console(file=output, width=200), "mine", model, optax.sgd(0.1), None)
    assert "The backward of stage 1 cannot be split" in output.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (2_345_000_000, "2.35 GB"), (7e15, "7,000 TB")],
)
def test_bytes_have_a_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_a_file_gets_whole_rows(capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print("word " * 100)
    assert len(capsys.readouterr().out.splitlines()) == 1
