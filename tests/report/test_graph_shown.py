"""What a plan shows of models that are no chains: what moves, where it waits, and stages that run no backward."""

import io
from pathlib import Path

import optax
import pytest
from rich.console import Console

from meshpipe.choose.chooser import Chooser
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.graph import Graph, Value, chain
from meshpipe.plan.lower import lower
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.simulate import Costs, StageMemory, simulate
from meshpipe.report.graph import forward_only_line, traffic_table, what_stages_run
from meshpipe.report.picture import Panel, draw_timelines
from meshpipe.report.plan import print_plan
from tests.graph_models import MODELS, batches


def rows(table: object) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=200).print(table)
    return [" ".join(line.split()) for line in output.getvalue().splitlines()]


def test_what_moves_is_a_row_for_each_name() -> None:
    values = (Value("", 0, (1,)), Value("early", 0, (2, 3)), Value("", 1, (2,)), Value("", 2, (3,)))
    plan = make_plan("gpipe", 2, 4, 2).on(Graph((False, True, True, True), values))
    inputs = [(), (1000.0,), (2000.0, 1000.0), (2000.0, 1000.0)]
    memory = [StageMemory(0, inputs=sizes, input_gradients=sizes) for sizes in inputs]
    # `early` is made on rank 0, which has stage 2 too; rank 1 reads it in stage 3.
    assert rows(traffic_table(lower(plan), memory, frozenset({"early"}))) == [
        "value made by read by size moves gradients back per step waits",
        "output stage 0 (rank 0) stage 1 (rank 1) 1 kB 1 x none 4 kB where it is read",
        "early stage 0 (rank 0) stages 2-3 (ranks 0-1) 2 kB 1 x none 8 kB where it is made",
        "output stages 1-2 (ranks 0-1) the next stage 1 kB 1 x 1 x 16 kB where it is read",
        "all 28 kB",
    ]


def test_stages_say_what_they_run() -> None:
    graph = Graph((False, False, True, False), chain(4).values)
    assert what_stages_run(graph) == ["forward alone"] * 2 + ["forward, backward", "forward, backward of its inputs"]
    assert list(forward_only_line(graph)) == ["Stages 0-1 run no backward: nothing is trained there or before."]
    assert what_stages_run(chain(4)) == list(forward_only_line(chain(4))) == []


def encoder_decoder(**options: object) -> StagedModel:
    model = MODELS["encoder-decoder"]
    task = Task(tuple(model.layers()), model.loss, batch=batches(1)[0], **options)  # type: ignore[arg-type]
    config = PipelineConfig(schedule="interleaved-1f1b", num_microbatches=4)
    return Chooser(task, optax.adam(0.1), mesh=make_mesh(4), config=config).choose()


def test_the_plan_of_an_encoder_decoder_with_a_frozen_encoder(tmp_path: Path) -> None:
    output, file = io.StringIO(), tmp_path / "plan.svg"
    print_plan(
        Console(file=output, width=200), "mine", encoder_decoder(trainable="layers/[3-7]/*"), optax.adam(0.1), file
    )
    text = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert "2 2 2 Dense 20 0 80 B none forward alone" in text
    assert "4 0 4 Cross 20 20 80 B none forward, backward" in text
    assert "Stages 0-2 run no backward: nothing is trained there or before." in text
    assert "memory stage 2 (rank 2) stages 4-7 (ranks 0-3) 256 B 3 x none 3.07 kB where it is read" in text
    grid = [line for line in text if line.startswith("rank 2 ")]
    assert grid[0].split(" ", 2)[2].replace(". ", "") == "2F0 2F1 2F2 2F3 6F0 6F1 6F2 6B0 6F3 6B1 6B2 6B3 ."
    assert file.exists()


def test_all_that_is_trained_in_a_chain_is_shown_as_ever() -> None:
    output = io.StringIO()
    task = Task(tuple(MODELS["skip"].layers()[1:3]), MODELS["skip"].loss, batch=batches(1)[0])
    config = PipelineConfig(num_microbatches=4)
    model = Chooser(task, optax.sgd(0.1), mesh=make_mesh(2), config=config).choose()
    print_plan(Console(file=output, width=200), "mine", model, optax.sgd(0.1), None)
    assert "What stages read" not in output.getvalue()
    assert "trained" not in output.getvalue().splitlines()[2]


@pytest.mark.parametrize(("stages", "label"), [(1, "no backward"), (2, "no backward of stage 0")])
def test_a_picture_names_the_stages_without_a_backward(tmp_path: Path, stages: int, label: str) -> None:
    plan = make_plan("gpipe", 2, 2, stages)
    plan = plan.on(Graph((False, *[True] * (plan.num_stages - 1)), plan.graph.values))
    file = tmp_path / "plan.svg"
    draw_timelines([Panel(simulate(plan, Costs.of_parts(stages, graph=plan.graph)), "mine")], file)
    assert f"<!-- {label} -->" in file.read_text()
