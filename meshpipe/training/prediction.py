"""The outputs of the last layer for batches of any size, without an update."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from meshpipe.layers.forwards import Forwards
from meshpipe.layers.microbatches import OwnBatch
from meshpipe.layers.staged_model import StagedModel
from meshpipe.mesh import submeshes
from meshpipe.pipeline.everywhere import Everywhere
from meshpipe.processes.group import Group
from meshpipe.sharding import Arrays, local_value
from meshpipe.training.state import TrainingState


class Predictor:
    """Runs batches through the forwards of a model, which are compiled at the first batch."""

    def __init__(
        self, model: StagedModel, training: TrainingState, seed_data: Mapping[int, jax.Array], group: Group
    ) -> None:
        self._model, self._training, self._seed_data, self._group = model, training, seed_data, group
        self._everywhere: Everywhere | None = None

    def predict(self, batch: Mapping[str, Any]) -> Any:
        """What the last layer puts out for a batch, as NumPy arrays with a row for each example, in its order; the same
        in all processes.

        Raises `ValueError` when fields differ from those of the example in more than the number of examples, or an
        output has no rows.
        """
        forwards = self._model.prediction
        assert forwards.output is not None
        found: list[list[np.ndarray]] = []
        waiting: tuple[list[Arrays], int] | None = None
        for part in forwards.microbatches.parts(batch):
            dispatched = self._dispatch(forwards, part)
            # It is read while the devices compute the next.
            found += [] if waiting is None else [_read(waiting, self._group.is_alone)]
            waiting = dispatched
        assert waiting is not None
        found.append(_read(waiting, self._group.is_alone))
        return jax.tree.unflatten(forwards.output.treedef, [np.concatenate(rows) for rows in zip(*found, strict=True)])

    def _dispatch(self, forwards: Forwards, part: OwnBatch) -> tuple[list[Arrays], int]:
        """What the microbatches that it takes put out, and the number of rows that count."""
        batches = forwards.microbatches
        rows = len(next(iter(part.values())))
        count = -(-rows * batches.count // batches.size)
        inputs = forwards.inputs(batches.padded(part), self._seed_data)
        self._group.calls += 1
        outputs = forwards.executor(count).outputs(self._training.params, self._training.state, inputs)
        return self._shared(forwards, outputs, count), rows

    def _shared(self, forwards: Forwards, outputs: list[Arrays], count: int) -> list[Arrays]:
        """The outputs in all processes; only those of the last stage have them before."""
        if self._group.is_alone:
            return outputs
        if self._everywhere is None:
            assert forwards.output is not None
            source = forwards.meshes[-1]
            shapes = forwards.output.on(source, forwards.microbatches.size // forwards.microbatches.count)
            name = f"{forwards.name}/outputs"
            self._everywhere = Everywhere(name, source, submeshes(self._model.mesh), shapes)
        return [self._everywhere(outputs[m] if outputs else None) for m in range(count)]


def _read(dispatched: tuple[list[Arrays], int], is_alone: bool) -> list[np.ndarray]:
    """Waits for the outputs of microbatches; their rows, without those that only fill up the batch."""
    outputs, rows = dispatched
    read = np.asarray if is_alone else local_value
    return [np.concatenate([read(part) for part in leaf])[:rows] for leaf in zip(*outputs, strict=True)]
