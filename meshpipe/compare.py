"""Every schedule on one model, side by side, in simulation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import optax

from meshpipe.memory import stage_memory
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.pipeline.plan import Op
from meshpipe.pipeline.schedules import STAGES_PER_RANK, takes_stages
from meshpipe.pipeline.simulate import Costs, StageMemory, Timeline, simulate
from meshpipe.staged_model import StagedModel


@dataclass(frozen=True)
class Comparison:
    """One schedule on the model."""

    schedule: str
    stages_per_rank: int
    timeline: Timeline | None
    """With memory; in forwards of all layers of a rank. None where the schedule does not fit."""
    reason: str = ""
    """Why it does not fit."""


def compare_schedules(
    build: Callable[[PipelineConfig], StagedModel], config: PipelineConfig, transformation: optax.GradientTransformation
) -> Iterator[Comparison]:
    """Every training schedule with the fewest stages per rank that it takes, or with those asked for if it takes them.

    `build` makes the model for a config that differs in schedule and stages per rank alone.
    """
    memories: dict[tuple[tuple[int, ...], bool], list[StageMemory]] = {}
    for name, (least, _) in STAGES_PER_RANK.items():
        if name == "inference":
            continue
        asked = config.stages_per_rank or least
        count = asked if takes_stages(name, asked) else least
        try:
            model = build(replace(config, schedule=name, stages_per_rank=count))
        except ValueError as error:
            yield Comparison(name, count, None, ". ".join(str(error).split(". ")[:2]))
            continue
        key = model.plan.stage_ranks, any(action.op is Op.BACKWARD_INPUT for action in model.plan.actions)
        if key not in memories:
            memories[key] = stage_memory(model, transformation)
        yield Comparison(name, count, simulate(model.plan, Costs.of_parts(count), memories[key]))
