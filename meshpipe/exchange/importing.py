"""`meshpipe.import_weights`: published weights become a checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from meshpipe.adapters.config import LoraConfig
from meshpipe.adapters.lora import with_lora
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


def import_weights(
    folder: str | Path,
    to: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    base: str | Path | None = None,
) -> ModelConfig:
    """Writes the weights of a folder, with config.json and files of safetensors, as step 0 of a folder of checkpoints;
    or adapters in a folder of PEFT, with the weights that they belong to.

    Parameters are read and written a few pieces at a time, so a model may be far larger than the memory. Tokenizer and
    config.json are copied to `to`/pretrained.

    Arguments:
        folder: The folder of weights or of adapters.
        to: Folder for the checkpoint, made when missing; it must hold none.
        dtype: The `param_dtype` of the model. float32 keeps every value; bfloat16 those of a folder in bfloat16, and
            rounds others. Adapters are float32.
        base: The folder of the weights below adapters; None takes `base_model_name_or_path`, where that is a folder.

    Returns the config of the model. Raises `WeightsError`, `CheckpointError` or `ArgumentError`, all `ValueError`s,
    when the folder is not one of a model that meshpipe computes, or `to` holds checkpoints; then nothing is written.
    """
    to = expanded("to", to)
    check_folder("to", to)
    weights = WeightsFolder(folder, base)
    if to.resolve() in (weights.folder.resolve(), expanded("folder", folder).resolve()):
        raise ArgumentError(f"`to` must be another folder than that of the weights. Got {str(to)!r}. Name another.")
    weights.model = _kept_in(weights.model, dtype)
    adapters = weights.adapters
    lora = LoraConfig() if adapters is None else adapters.lora
    found = [layer.params for layer in abstract_layers(with_lora(weights.model.layers(), lora), None)]
    shapes = {path: leaf for params in found for path, leaf in params.items()}
    weights.check(shapes)
    factors = frozenset[str]() if adapters is None else adapters.leaves
    sources = weights.sources({path: leaf for path, leaf in shapes.items() if path not in factors})

    def read(key: str, part: Region) -> np.ndarray:
        path = key.partition("/")[2]
        if adapters is not None and path in factors:
            return adapters.value(path, shapes[path].shape)[part]
        return read_region(sources[path], shapes[path], part)

    _save(weights, to, shapes, read)
    return weights.model


def _kept_in(model: ModelConfig, dtype: str) -> ModelConfig:
    changes: Any = {"param_dtype": dtype}
    return replace(model, **changes)


def _save(
    weights: WeightsFolder,
    to: str | Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[str, Region], np.ndarray],
) -> None:
    """Saves leaves as step 0, with what goes with the weights. Raises as `import_weights` does."""
    metadata = _metadata(weights)
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


def _metadata(weights: WeightsFolder) -> dict[str, Any]:
    """Of the step that is imported."""
    config = {"model": {"type": type(weights.model).__name__, **config_values(weights.model)}}
    if weights.adapters is not None:
        config["lora"] = config_values(weights.adapters.lora)
    return {"step": 0, "config": config, "imported_from": str(weights.folder), "versions": versions()}
