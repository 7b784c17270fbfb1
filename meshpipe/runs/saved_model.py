"""The model of a recipe as a run saved it: the recipe's own, with the fields that flags had changed."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from meshpipe.adapters.config import LoraConfig
from meshpipe.adapters.groups import LoraGroup
from meshpipe.checkpoint import CheckpointError
from meshpipe.data import DataConfig
from meshpipe.errors import ArgumentError
from meshpipe.models.model import ModelConfig
from meshpipe.runs.recipe import find
from meshpipe.runs.record import config_values
from meshpipe.weights.model_of import MODELS, saved_model_of
from meshpipe.weights.published_model import PublishedModel


def saved_model(metadata: Mapping[str, Any], directory: Path, asked: str) -> ModelConfig:
    """The model that the metadata of a step describe. Runs the recipe's file, which the metadata name.

    Raises `CheckpointError` when no recipe was saved, or its model cannot be made as it was; `RecipeError` when there
    is no such recipe or it fails.
    """
    if asked != "recipe":
        raise ArgumentError(f'`layers` must be a list of layers, or "recipe". Got {asked!r}.')
    recipe, config = metadata.get("recipe"), metadata.get("config")
    saved = config.get("model") if isinstance(config, dict) else None
    if recipe is None and isinstance(saved, dict) and saved.get("type") in MODELS:
        return saved_model_of(metadata, directory)  # of imported weights
    if not isinstance(recipe, str) or not isinstance(saved, dict):
        raise CheckpointError(
            f"The metadata of a checkpoint must name the recipe that was trained. Those in {directory} name none: "
            "it was not saved by a command. Pass the `layers` themselves."
        )
    if ":" not in recipe:
        raise CheckpointError(
            f"The metadata of a checkpoint must name the recipe that was trained. Those in {directory} name "
            f"{recipe!r:.80}: it was saved by meshpipe.run without a recipe's `name`. Pass the `layers` themselves."
        )
    model = find(recipe).config().model
    if isinstance(model, PublishedModel):
        return saved_model_of(metadata, directory)  # the recipe does not know it
    kind = saved.get("type")
    if kind != type(model).__name__:
        raise CheckpointError(
            f"The recipe must have the model that was saved. {recipe} has {type(model).__name__}, and {directory} was "
            f"saved with {kind!r:.40}. Restore the recipe, or pass the `layers` themselves."
        )
    made: ModelConfig = _with_values(model, saved)
    found = json.loads(json.dumps(config_values(made)))
    for name in sorted(found.keys() | (saved.keys() - {"type"})):
        if name not in saved and getattr(made, name) == _default(made, name):
            continue  # a field that the version which saved it lacked
        if found.get(name) != saved.get(name):
            raise CheckpointError(
                f"The model must have the fields that were saved. {name} of {recipe} is {found.get(name)!r:.60}, and "
                f"{directory} was saved with {saved.get(name)!r:.60}. Restore the recipe, or pass the `layers` "
                "themselves."
            )
    return made


def _default(config: ModelConfig, name: str) -> Any:
    """The default of a field; `MISSING` if it has none."""
    field = next(field for field in fields(config) if field.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def saved_lora(metadata: Mapping[str, Any], directory: Path) -> LoraConfig:
    """The adapters that the metadata of a step describe; those of older versions describe none.

    Raises `CheckpointError` for metadata that no run writes.
    """
    config = metadata.get("config")
    saved = config.get("lora", {}) if isinstance(config, dict) else {}
    try:
        targets = tuple(saved.get("targets") or ()) or None  # older versions had an empty list for all
        groups = tuple(LoraGroup(**group) for group in saved.get("groups", ()))
        return LoraConfig(**{**saved, "targets": targets, "groups": groups})
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The metadata of a checkpoint must describe its adapters as a run saves them. Got {saved!r:.80} in "
            f"{directory}: {error}"
        ) from None


def saved_data(data: DataConfig, metadata: Mapping[str, Any]) -> DataConfig:
    """The data of a recipe with the numbers, flags and names that were saved."""
    config = metadata.get("config")
    saved = config.get("data") if isinstance(config, dict) else None
    made: DataConfig = _with_values(data, saved) if isinstance(saved, dict) else data
    return made


def _with_values(config: Any, saved: Mapping[str, Any]) -> Any:
    """The config with its numbers, flags and names as they were saved; other values stay, and are compared."""
    changes = {}
    for field in fields(config):
        if field.name not in saved:
            continue
        value, other = getattr(config, field.name), saved[field.name]
        if is_dataclass(value) and isinstance(other, dict):
            changes[field.name] = _with_values(value, other)
        elif _is_like(value, other) and value != other:
            changes[field.name] = other
    return replace(config, **changes) if changes else config


def _is_like(value: Any, saved: Any) -> bool:
    """Whether JSON holds such a value as it is."""
    if value is None or saved is None:
        return isinstance(value, bool | int | float | str | None) and isinstance(saved, bool | int | float | str | None)
    if isinstance(value, float):
        return isinstance(saved, int | float) and not isinstance(saved, bool)
    return isinstance(value, bool | int | str) and type(value) is type(saved)
