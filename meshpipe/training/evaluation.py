"""Means over batches without an update, and the broadcast of the last stage's values."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from meshpipe.errors import ArgumentError
from meshpipe.layers.forwards import Forwards
from meshpipe.layers.microbatches import OwnBatch
from meshpipe.layers.staged_model import StagedModel
from meshpipe.optimizer.sums import LOSS, WEIGHT, means
from meshpipe.processes.group import Group
from meshpipe.sharding import Arrays, local_value

LAST_STAGE_SECONDS = 3600.0
"""How long to wait for the value of the last stage."""


@runtime_checkable
class Values(Protocol):
    """The values of a model by local stage, in the order of the stage's leaves."""

    @property
    def params(self) -> Mapping[int, Arrays]: ...

    @property
    def state(self) -> Mapping[int, Arrays]: ...


def evaluate(
    model: StagedModel,
    values: Values,
    batches: Iterable[Mapping[str, Any]],
    seed_data: Mapping[int, jax.Array],
    group: Group,
) -> dict[str, float]:
    """Means of the loss and the metrics over all batches, the same in all processes.

    Raises `ValueError` when there is no batch, or `batches` is one.
    """
    if isinstance(batches, Mapping):
        raise ArgumentError("`evaluate` takes batches, one after the other. Got one. Write evaluate([batch]).")
    found: list[dict[int, dict[str, float]]] = []
    for batch in batches:
        for forwards, count, part in _pieces(model, batch):
            inputs = forwards.inputs(part, seed_data)
            group.calls += 1
            _, _, sums = forwards.executor(count).run(values.params, values.state, inputs)
            found.append({s: {n: float(local_value(v)) for n, v in own.items()} for s, own in sums.items()})
    if not found:
        raise ArgumentError("Evaluation needs at least one batch. Got `batches` without any.")
    own = {s: {name: sum(sums[s][name] for sums in found) for name in found[0][s]} for s in found[0]}
    if group.is_alone or not model.evaluation.adds_up_early:
        return from_last_stage(model, group, means(_total(own)) if model.plan.num_stages - 1 in own else {})
    texts = group.gather("sums", json.dumps(own), LAST_STAGE_SECONDS)
    return means(_total({int(s): sums for text in texts for s, sums in json.loads(text).items()}))


def _total(sums: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Adds up the sums of all stages; the loss, which the last one has, stands first."""
    total: dict[str, float] = {LOSS: 0.0, WEIGHT: 0.0}
    for s in sorted(sums):
        for name, value in sums[s].items():
            total[name] = total.get(name, 0.0) + value
    return total


def _pieces(model: StagedModel, batch: Mapping[str, Any]) -> Iterator[tuple[Forwards, int, OwnBatch]]:
    """What computes the sums of a batch of any size, each with the number of microbatches to run and their batch.

    No example is masked, since a loss may have no way to: whole microbatches run through the programs of whole batches,
    of which the other microbatches are left out, and the rest is one microbatch of its own size, compiled for it.
    """
    whole = model.evaluation
    size = model.microbatches.size // model.microbatches.count
    for part in model.microbatches.parts(batch):
        count, rest = divmod(len(next(iter(part.values()))), size)
        if not rest and count == model.microbatches.count:
            yield whole, count, part
            continue
        if count:
            yield whole, count, model.microbatches.padded(part)
        if rest:
            last = OwnBatch({name: value[-rest:].copy() for name, value in part.items()})
            yield model.evaluation_of_rest(rest), 1, last


def from_last_stage(model: StagedModel, group: Group, value: Any) -> Any:
    """Broadcasts a tree of numbers, in its order, from the process of the last stage to all processes.

    It is available only after every process has dispatched its share of the work.
    """
    if group.is_alone:
        return value
    last = model.stages[-1].submesh.devices.flat[0].process_index
    text = json.dumps(value, default=float) if jax.process_index() == last else None
    return json.loads(group.broadcast("last stage", text, last, LAST_STAGE_SECONDS))
