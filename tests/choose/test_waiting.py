"""Where values wait that other ranks read: where it is needed for the fullest rank, and nowhere else."""

import optax
import pytest

from meshpipe.choose.chooser import Chooser
from meshpipe.choose.waiting import choose_late
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.graph import Graph, Value
from meshpipe.plan.lower import Transfer
from meshpipe.plan.schedules import make_plan
from meshpipe.plan.simulate import StageMemory
from tests.graph_models import MODELS, batches

SKIP = Graph((True,) * 4, (Value("", 0, (1,)), Value("early", 0, (3,)), Value("", 1, (2,)), Value("", 2, (3,))))


def memory(fullest: int) -> list[StageMemory]:
    """`early` is large, and the stage of that number holds most besides."""
    inputs = [(), (1.0,), (1.0,), (8.0, 1.0)]
    return [StageMemory(0, always=100.0 * (s == fullest), inputs=sizes) for s, sizes in enumerate(inputs)]


def test_a_value_waits_where_there_is_space() -> None:
    plan = make_plan("1f1b", 4, 6).on(SKIP)
    assert choose_late(plan, memory(fullest=0)) == frozenset()
    assert choose_late(plan, memory(fullest=3)) == {"early"}
    assert choose_late(plan, memory(fullest=1)) == frozenset()  # it makes no difference there


@pytest.mark.parametrize("name", ["skip", "encoder-decoder"])
def test_the_program_of_a_model_moves_late_values_late(name: str) -> None:
    model = MODELS[name]
    task = Task(tuple(model.layers()), model.loss, input="inputs", batch=batches(1)[0])
    config = PipelineConfig(schedule="1f1b", num_microbatches=4)
    chosen = Chooser(task, optax.sgd(0.1), mesh=make_mesh(4), config=config).choose()
    sizes = chosen.value_bytes()
    assert set(sizes.values()) == {4 * 4 * 4 * 4}  # of a microbatch of 4 examples
    instructions = [i for i in chosen.lowered.instructions if isinstance(i, Transfer) and i.source.kind == "y"]
    named = [i for i in instructions if i.source.name]
    assert len(named) == 4 * (2 if name == "skip" else 3 - 1)
    assert set(chosen.late) <= {value.name for value in sizes}
