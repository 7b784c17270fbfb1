"""Decides where values wait that another rank reads long after they were made."""

from collections.abc import Sequence
from dataclasses import replace

import optax

from meshpipe.choose.capacity import least_memory
from meshpipe.choose.memory import ONE_UNIT_EACH
from meshpipe.layers.staged_model import StagedModel
from meshpipe.plan.graph import Value
from meshpipe.plan.plan import Plan
from meshpipe.plan.simulate import StageMemory, Timeline


def settle_waiting(model: StagedModel, transformation: optax.GradientTransformation) -> None:
    """Chooses which values of the model wait on the rank that makes them.

    Every process must choose the same, and traces only its own stages: so activations count as no more than the values
    that stages read, which they keep.
    """
    if may_wait(model.plan):
        sizes, graph = model.value_bytes(), model.plan.graph
        inputs = [tuple(sizes[value] for value in graph.inputs(stage)) for stage in range(graph.num_stages)]
        memory = [StageMemory(sum(read), inputs=read, kept_inputs=read) for read in inputs]
        for rank, parts in enumerate(least_memory(model, transformation)):
            first = model.plan.stages_of(rank)[0]
            memory[first] = replace(memory[first], always=sum(parts.values()))
        model.late = choose_late(model.plan, memory)


def may_wait(plan: Plan) -> list[Value]:
    """The values that have a choice: those with a name that another rank reads."""
    ranks = plan.stage_ranks
    return [
        value
        for value in plan.graph.values
        if value.name and any(ranks[target] != ranks[value.source] for target in value.targets)
    ]


def choose_late(plan: Plan, memory: Sequence[StageMemory]) -> frozenset[str]:
    """The names of the values that wait on the rank that makes them, and move when another rank first reads them.

    Every other value moves as soon as it is made, so that it is there in time. A value is late if the rank that holds
    most then holds less, looking at one value after the other, the largest first.
    """
    timeline = Timeline.of(plan, ONE_UNIT_EACH, memory)
    least = max(timeline.peak_bytes)
    size = {value: memory[value.targets[0]].inputs[_place(plan, value)] for value in may_wait(plan)}
    for value in sorted(size, key=lambda value: -size[value]):
        tried = replace(timeline, late=frozenset({*timeline.late, value.name}))
        if max(tried.peak_bytes) < least:
            timeline, least = tried, max(tried.peak_bytes)
    return frozenset(timeline.late)


def _place(plan: Plan, value: Value) -> int:
    return plan.graph.inputs(value.targets[0]).index(value)
