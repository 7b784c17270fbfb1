"""The model that a folder holds weights of, without its recipe: by config.json, or by what a checkpoint says."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from meshpipe.checkpoint.inspection import reader_of
from meshpipe.errors import ArgumentError
from meshpipe.models.gpt2 import GPT2Config
from meshpipe.models.language_model import LanguageModelConfig
from meshpipe.models.model import ModelConfig
from meshpipe.weights.errors import WeightsError
from meshpipe.weights.folder import HERE, WeightsFolder, is_published

MODELS: Mapping[str, type[ModelConfig]] = {
    "LanguageModelConfig": LanguageModelConfig,
    "GPT2Config": GPT2Config,
}


def model_of(folder: str | Path, step: int | None = None, *, init_base: str | None = None) -> ModelConfig:
    """The config of the model in a folder of weights, or of adapters upon those in `init_base`; or in a folder of
    checkpoints of one of `MODELS`, of which the newest counts, or `step`.

    Raises `WeightsError` or `CheckpointError`, both `ValueError`s, when the folder holds neither.
    """
    reader = reader_of(folder)
    steps = reader.steps()
    if not steps and is_published(folder):
        return WeightsFolder(folder, init_base, "init_base").model
    if not steps:
        raise WeightsError(
            f"A model is read from a folder of weights, with config.json and files of safetensors, or from one of "
            f"checkpoints. Got {str(folder)!r}, which holds neither. {HERE}"
        )
    return saved_model_of(reader.metadata(steps[-1] if step is None else step), reader.directory)


def saved_model_of(metadata: Mapping[str, Any], directory: Path) -> ModelConfig:
    """The model that the metadata of a checkpoint describe. Raises `WeightsError` when it is none of `MODELS`."""
    config = metadata.get("config")
    saved = config.get("model") if isinstance(config, dict) else None
    kind = saved.get("type") if isinstance(saved, dict) else None
    if not isinstance(saved, dict) or kind not in MODELS:
        raise WeightsError(
            f"Without its recipe, the model of a checkpoint must be one of {', '.join(MODELS)}. Got {kind!r:.60} in "
            f"{directory}."
        )
    try:
        return _made(MODELS[str(kind)], {name: value for name, value in saved.items() if name != "type"})
    except (TypeError, ArgumentError) as error:
        raise WeightsError(
            f"The metadata of a checkpoint must describe the model as this version does. Got {directory}: {error}. "
            "Read it with the version that saved it."
        ) from None


def _made(kind: Any, values: Mapping[str, Any]) -> Any:
    """A config from the values of its fields, as JSON holds them."""
    default = kind.debug() if hasattr(kind, "debug") else kind()
    nested = {f.name for f in fields(kind) if is_dataclass(getattr(default, f.name))}
    made = {
        name: _made(type(getattr(default, name)), value) if name in nested and isinstance(value, dict) else value
        for name, value in values.items()
    }
    return kind(**made)
