"""Means over batches without an update, and what the last stage tells all processes."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from meshpipe.errors import ArgumentError
from meshpipe.layers.staged_model import StagedModel
from meshpipe.processes.group import Group
from meshpipe.sharding import local_value
from meshpipe.training.state import TrainingState

LAST_STAGE_SECONDS = 3600.0
"""How long to wait for what the last stage found out."""


def evaluate(
    model: StagedModel,
    training: TrainingState,
    batches: Iterable[Mapping[str, Any]],
    seed_data: Mapping[int, jax.Array],
    group: Group,
) -> dict[str, float]:
    """Means of the loss and the metrics over all batches, the same in all processes.

    Raises `ValueError` when there is no batch, or `batches` is one.
    """
    if isinstance(batches, Mapping):
        raise ArgumentError("`evaluate` takes batches, one after the other. Got one. Write evaluate([batch]).")
    executor, names = model.evaluation
    sums: list[np.ndarray] = []
    for batch in batches:
        inputs = model.evaluation_inputs(batch, seed_data)
        group.calls += 1
        _, _, totals = executor.run(training.params, training.state, inputs)
        sums.append(np.asarray([local_value(value) for value in totals], np.float64))
    if not sums:
        raise ArgumentError("Evaluation needs at least one batch. Got `batches` without any.")
    total = np.sum(sums, axis=0)
    sums_and_weights = zip(names, total[::2].tolist(), total[1::2].tolist(), strict=bool(len(total)))
    means = {name: value / weight if weight else math.nan for name, value, weight in sums_and_weights}
    return from_last_stage(model, group, means)


def from_last_stage(model: StagedModel, group: Group, value: Any) -> Any:
    """What the processes of the last stage have, in all processes; anything that JSON can hold.

    The last stage has a value only after all have handed over the work that it comes from.
    """
    if group.is_alone:
        return value
    last = model.stages[-1].submesh.devices.flat[0].process_index
    text = json.dumps(jax.tree.map(float, value)) if jax.process_index() == last else None
    return json.loads(group.broadcast("last stage", text, last, LAST_STAGE_SECONDS))
