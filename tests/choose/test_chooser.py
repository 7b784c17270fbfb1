"""What a run leaves open is chosen as asked: cuts by cost, and plans no slower than any named one that fits."""

import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
import tiny_recipes
from flax import nnx

from meshpipe.choose.chooser import measuring_mesh
from meshpipe.choose.memory import predict_memory, stage_memory
from meshpipe.config import Config
from meshpipe.layers.staged_model import StagedModel
from meshpipe.mesh import MeshConfig
from meshpipe.pipeline.config import PipelineConfig, parse_bytes
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts, Setting
from meshpipe.plan.schedules import SCHEDULES, takes_stages
from meshpipe.plan.simulate import simulate
from meshpipe.report.plan import layout_lines
from meshpipe.runs.build import make_chooser, make_trainer


def layer(times: float) -> LayerCosts:
    return LayerCosts("Dense", times, 2.1 * times, times, times, transfer=0.1, parameter_bytes=1, activation_bytes=1)


def costs(*times: float) -> ModelCosts:
    return ModelCosts(tuple(map(layer, times)), Setting(4, 1, 1, "none"), "cpu", 1.5)


UNEVEN = costs(1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 4.0)


def recipe(**pipeline: Any) -> Config:
    config = replace(tiny_recipes.pipeline(), model=tiny_recipes.DenseConfig(depth=8))
    return replace(config, pipeline=replace(config.pipeline, **pipeline))


def chosen(given: ModelCosts | None = UNEVEN, **pipeline: Any) -> StagedModel:
    return make_chooser(recipe(**pipeline)).choose(given)


def step(model: StagedModel) -> float:
    return simulate(model.plan, model.stage_costs).makespan


def test_nothing_is_chosen_unless_asked_for() -> None:
    model = chosen(None)
    assert model.cuts == (range(4), range(4, 8))
    assert model.stage_costs is None


def test_cut_by_costs() -> None:
    model = chosen(partition="measured")
    assert model.cuts == (range(5), range(5, 8))
    assert step(model) < step(chosen(partition="even"))


def test_two_stages_per_rank_balance_ranks() -> None:
    model = chosen(partition="measured", schedule="zb-v")
    assert model.plan.stage_ranks == (0, 1, 1, 0)
    busy = simulate(model.plan, model.stage_costs).busy
    assert max(busy) < 1.01 * min(busy)


def test_cut_by_operations_runs_nothing() -> None:
    wide = replace(recipe(partition="cost"), model=WideEnd())
    model = make_chooser(wide).choose()
    assert model.cuts == (range(4), range(4, 5))
    assert model.stage_costs is None
    assert layout_lines("wide", model)[2].endswith("expected bubble 20.0% if stages cost the same, partition cost")


class WideEnd(tiny_recipes.DenseConfig):
    """Four layers of width 8, then one with sixteen times the work."""

    def layers(self) -> list[Any]:
        return [*super().layers(), lambda rngs: Wide(rngs)]


class Wide(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.up(x))


@pytest.mark.parametrize(
    ("partition", "limit"), [("measured", None), pytest.param("even", "7.2kB", marks=pytest.mark.slow)]
)
def test_auto_is_no_slower_than_any_named_schedule_that_fits(partition: str, limit: str | None) -> None:
    model = chosen(schedule="auto", partition=partition, memory_limit=limit)
    transformation = recipe().optimizer.build(6)
    most = float("inf") if limit is None else parse_bytes(limit)
    assert max(rank.total for rank in predict_memory(model, transformation)) <= most
    for name in SCHEDULES:
        for stages_per_rank in (1, 2):
            if name != "inference" and takes_stages(name, stages_per_rank):
                other = chosen(schedule=name, stages_per_rank=stages_per_rank, partition=partition)
                memory = stage_memory(other, transformation) if limit else ()
                timeline = simulate(other.plan, other.stage_costs, memory)
                if limit is None or max(timeline.peak_bytes) <= most:
                    assert step(model) <= timeline.makespan * (1 + 1e-9), name
    assert layout_lines("tiny", model)[2].startswith("auto")


def test_auto_takes_the_stages_that_it_is_given() -> None:
    for number in (1, 3):
        assert chosen(schedule="auto", stages_per_rank=number).plan.num_stages == 2 * number
    assert chosen(schedule="auto", partition="0,2,4,6").cuts == (range(2), range(2, 4), range(4, 6), range(6, 8))


@pytest.mark.slow
def test_auto_takes_fewer_stages_where_more_hardly_pay() -> None:
    """Rank 1 waits for two layers or for one; each rank has 240 to compute, forward and both parts of backward."""
    equal = ModelCosts((replace(layer(1.0), transfer=0.0),) * 8, Setting(2, 1, 1, "none"), "cpu", 1.5)
    pipeline = PipelineConfig(schedule="auto", num_microbatches=20, partition="measured")
    config = replace(recipe(), pipeline=pipeline, batch_size=40)
    two, four = (
        make_chooser(replace(config, pipeline=replace(pipeline, stages_per_rank=number))).choose(equal)
        for number in (2, 4)
    )
    assert step(four) < step(two) < 1.005 * step(four)
    assert make_chooser(config).choose(equal).plan == two.plan


def test_a_limit_that_nothing_keeps_to_says_what_would_do() -> None:
    with pytest.raises(ValueError, match="fullest rank\\. Got a memory limit of 3,000 bytes") as error:
        chosen(schedule="auto", memory_limit="3kB")
    least = int(re.findall(r"at least ([\d,]+) bytes", str(error.value))[0].replace(",", ""))
    with pytest.raises(ValueError, match="Raise it"):
        chosen(schedule="auto", memory_limit=str(least - 1))


def test_costs_of_a_file_are_taken(tmp_path: Any) -> None:
    file = tmp_path / "costs.json"
    UNEVEN.save(file)
    model = chosen(None, partition="measured", costs=str(file))
    assert model.cuts == chosen(partition="measured").cuts
    assert layout_lines("tiny", model)[2].endswith(f"partition measured, costs of {file}, measured on cpu")


def test_training_with_what_was_measured_gives_the_same_numbers() -> None:
    batch = {"inputs": np.ones((16, 8), np.float32), "labels": np.zeros(16, np.int32)}
    plain = replace(tiny_recipes.pipeline(), model=tiny_recipes.DenseConfig(depth=2))
    trainer = make_trainer(replace(plain, pipeline=replace(plain.pipeline, schedule="auto")))
    assert trainer.plan.schedule.startswith("auto")
    assert "costs measured on cpu in " in layout_lines("tiny", trainer.model)[2]
    alone = make_trainer(replace(plain, mesh=MeshConfig(), pipeline=PipelineConfig()))
    assert float(trainer.step(batch).loss) == pytest.approx(float(alone.step(batch).loss), rel=1e-6)


def test_before_and_after() -> None:
    before, after = make_chooser(recipe(partition="1")).before_and_after(UNEVEN)
    assert (before.cuts[0], after.cuts[0]) == (range(1), range(5))
    before, _ = make_chooser(recipe(partition="measured")).before_and_after(UNEVEN)
    assert before.cuts[0] == range(4)


def test_layers_are_measured_on_one_rank_or_two() -> None:
    assert measuring_mesh(MeshConfig(pipeline=4, data=2)).shape["pipeline"] == 2
    assert measuring_mesh(MeshConfig(pipeline=1, data=2)).shape["pipeline"] == 1
    assert measuring_mesh(MeshConfig(pipeline=2, data=8)).shape["pipeline"] == 1


@pytest.mark.parametrize(("text", "boundaries"), [("even", None), ("0", ()), ("0,2,4", (2, 4)), ("2,4", (2, 4))])
def test_first_layers_are_read(text: str, boundaries: tuple[int, ...] | None) -> None:
    assert PipelineConfig(partition=text).boundaries == boundaries


@pytest.mark.parametrize("text", ["", "0,,2", "-1", "1;2", "Even"])
def test_partitions_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="`partition` must be one of even, cost, measured"):
        PipelineConfig(partition=text)
