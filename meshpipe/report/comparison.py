"""Compares all schedules on one model, in simulation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from meshpipe.choose.chooser import Chooser
from meshpipe.choose.memory import stage_memory
from meshpipe.choose.remat import TooLarge
from meshpipe.machine import format_bytes
from meshpipe.phases import each
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.layer_costs import ModelCosts
from meshpipe.plan.schedules import STAGES_PER_RANK, takes_stages
from meshpipe.plan.simulate import Costs, Timeline, simulate


@dataclass(frozen=True)
class Comparison:
    """One schedule on the model."""

    schedule: str
    stages_per_rank: int | None
    timeline: Timeline | None
    """Its timeline, with memory; in seconds if costs are known, else in forwards of all layers of a rank. None where
    the schedule does not fit."""
    reason: str = ""
    """Why it does not fit."""


def compare_schedules(chooser: Chooser, costs: ModelCosts | None) -> Iterator[Comparison]:
    """Every training schedule, with the requested number of stages per rank if it allows that, else with the fewest.

    With costs, given or asked for by the chooser's config, `auto` is compared too.
    """
    config = chooser.config
    if costs is None and config.needs_costs:
        costs = ModelCosts.load(config.costs) if config.costs else chooser.measure()
    for name, (least, _) in each("Simulating", "schedule", list(STAGES_PER_RANK.items())):
        if name != "inference":
            asked = config.stages_per_rank or least
            count = asked if takes_stages(name, asked) else least
            limit = config.memory_limit if config.remat == "auto" else None
            of_schedule = replace(config, schedule=name, stages_per_rank=count, costs=None, memory_limit=limit)
            yield _compared(chooser, of_schedule, costs)
    if costs is not None:
        yield _compared(chooser, replace(config, schedule="auto", costs=None), costs)


def _compared(chooser: Chooser, config: PipelineConfig, costs: ModelCosts | None) -> Comparison:
    try:
        model = replace(chooser, config=config).choose(costs)
    except TooLarge as error:
        reason = f"needs {format_bytes(error.needed)}, limit {format_bytes(error.limit)}"
        return Comparison(config.schedule, config.stages_per_rank, None, reason)
    except ValueError as error:
        return Comparison(config.schedule, config.stages_per_rank, None, ". ".join(str(error).split(". ")[:2]))
    count = model.plan.num_stages // model.plan.num_ranks
    times = model.stage_costs or Costs.of_parts(count)
    timeline = simulate(model.plan, times, stage_memory(model, chooser.transformation))
    name = config.schedule if config.schedule != "auto" else model.plan.schedule
    return Comparison(name, count, timeline)
