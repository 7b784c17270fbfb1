"""`meshpipe.import_weights`: published weights become a checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshpipe.checkpoint import Checkpointer, CheckpointWriteError
from meshpipe.checkpoint.chunks import Region
from meshpipe.environment import versions
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder, expanded
from meshpipe.layers.examine import abstract_layers
from meshpipe.models.model import ModelConfig
from meshpipe.runs.record import config_values
from meshpipe.weights import WeightsError, WeightsFolder
from meshpipe.weights.companions import keep_companions
from meshpipe.weights.reading import read_region


def import_weights(folder: str | Path, to: str | Path) -> ModelConfig:
    """Writes the weights of a folder, with config.json and files of safetensors, as step 0 of a folder of checkpoints.

    Parameters are float32, as models have them, so every value is kept. They are read and written a few pieces at a
    time, so a model may be far larger than the memory. Tokenizer and config.json are copied to `to`/pretrained.

    Returns the config of the model. Raises `WeightsError`, `CheckpointError` or `ArgumentError`, all `ValueError`s,
    when the folder is not one of a model that meshpipe computes, or `to` holds checkpoints; then nothing is written.
    """
    to = expanded("to", to)
    check_folder("to", to)
    weights = WeightsFolder(folder)
    found = [layer.params for layer in abstract_layers(weights.model.layers(), None)]
    shapes = {path: leaf for params in found for path, leaf in params.items()}
    weights.check(shapes)
    sources = weights.sources(shapes)

    def read(key: str, part: Region) -> np.ndarray:
        path = key.partition("/")[2]
        return read_region(sources[path], shapes[path], part)

    save_imported(weights, to, shapes, read, imported_metadata(weights))
    return weights.model


def save_imported(
    weights: WeightsFolder,
    to: str | Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str, Region], np.ndarray],
    metadata: Mapping[str, Any],
) -> None:
    """Saves leaves as step 0, with what goes with the weights. Raises as `import_weights` does."""
    with Checkpointer(to, keep=0) as checkpointer:
        if checkpointer.steps():
            raise ArgumentError(
                f"`to` must be a folder without checkpoints. Got {str(to)!r}, which holds steps up to "
                f"{checkpointer.latest()}. Name another folder, or remove that one."
            )
        tree = {"params": {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}}
        checkpointer.prepare([tree], metadata)
        checkpointer.save_as_read(0, tree, read, metadata)
        try:
            checkpointer.wait()
        except CheckpointWriteError as error:
            if isinstance(cause := error.__cause__, WeightsError):
                raise cause from None
            raise ArgumentError(f"`to` must be a folder with room for the weights. {error} Make room.") from error
        keep_companions(weights, checkpointer.directory)


def imported_metadata(weights: WeightsFolder) -> dict[str, Any]:
    """Of the step that is imported."""
    model = {"type": type(weights.model).__name__, **config_values(weights.model)}
    return {"step": 0, "config": {"model": model}, "imported_from": str(weights.folder), "versions": versions()}
