"""Metadata of a run, as saved in metrics and checkpoints."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from meshpipe.config import Config
from meshpipe.data.batch import ADDRESS
from meshpipe.documents import is_count
from meshpipe.environment import versions
from meshpipe.errors import ArgumentError
from meshpipe.layers.staged_model import StagedModel

MAY_CHANGE: Mapping[str, frozenset[str]] = {
    "model": frozenset(),
    "lora": frozenset(),
    "optimizer": frozenset({"learning_rate", "warmup_steps", "decay", "weight_decay", "clip_norm", "groups"}),
}
"""Fields that may change when a run is resumed: they affect future steps, not the saved state. Of `groups`,
`check_continues` compares what does."""


def config_values(config: Any) -> Any:
    """A configuration as nested dicts of JSON values; model and data also have their `type`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {field.name: config_values(getattr(config, field.name)) for field in dataclasses.fields(config)}
        nested = {name: getattr(config, name) for name in ("model", "data") if name in values}
        for name, part in nested.items():
            if isinstance(values[name], dict):
                values[name] = {"type": type(part).__name__, **values[name]}
        return values
    if isinstance(config, Mapping):
        return {str(name): config_values(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [config_values(value) for value in config]
    if isinstance(config, float) and not math.isfinite(config):
        return str(config)  # JSON has no such numbers
    return config if config is None or isinstance(config, bool | int | float | str) else _describe(config)


def _describe(value: Any) -> str:
    """A textual form of a value that is the same in every run; a function is described by name, not address."""
    if isinstance(value, functools.partial):
        keywords = {name: config_values(part) for name, part in value.keywords.items()}
        return f"{_describe(value.func)}{(*map(config_values, value.args),)}{keywords or ''}"
    if callable(value) and not isinstance(value, type) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def check_can_be_saved(config: Config) -> None:
    """Raises `ArgumentError` when the config contains a value whose text differs in every run, so that its checkpoints
    could not be resumed.
    """
    values = config_values(config)
    for part in MAY_CHANGE:
        for name, value in values[part].items():
            if ADDRESS.search(text := json.dumps(value)):
                raise ArgumentError(
                    f"A config must have the same text in every run, since a resumed run is compared by it. Got {text} "
                    f"for {name} of the {part}. Give its class a __repr__, or save no checkpoints."
                )


def layout_values(
    config: Config, stages: Sequence[range], schedule: str | None = None, remat: Sequence[str] = ()
) -> dict[str, Any]:
    """Mesh axes, schedule, rematerialisation and the layers of every stage, with the values chosen for open settings.

    `schedule` is the name of the plan and `remat` has a name for every stage; they replace `auto` in the config.
    """
    chosen: dict[str, Any] = {
        "stages_per_rank": len(stages) // config.mesh.pipeline,
        "partition": ",".join(str(layers.start) for layers in stages),
    }
    if config.pipeline.schedule == "auto" and schedule is not None:
        chosen["schedule"] = schedule
    if config.pipeline.remat == "auto" and remat:
        chosen["remat"] = ",".join(remat)
    return config_values(config.mesh) | config_values(config.pipeline) | chosen


def run_layout(config: Config, model: StagedModel) -> dict[str, Any]:
    """The layout of a run with this model."""
    return layout_values(config, model.cuts, model.plan.schedule, model.remat or ())


def device_names(devices: Iterable[jax.Device]) -> list[str]:
    """The devices as `platform:id`, with their kind if it differs from the platform."""
    return [
        f"{d.platform}:{d.id}" if d.device_kind.lower() == d.platform else f"{d.platform}:{d.id} {d.device_kind}"
        for d in devices
    ]


def checkpoint_metadata(
    config: Config,
    recipe: str,
    layout: Mapping[str, Any],
    step: int,
    data: Mapping[str, Any],
    left_out: int = 0,
    tokens_seen: int | None = None,
) -> dict[str, Any]:
    """The metadata saved with the arrays. `layout` is the layout of the run, `data` the position in the training data,
    `left_out` the number of updates left out so far, and `tokens_seen` that of tokens, where there are tokens.
    """
    return {
        "step": step,
        "left_out": left_out,
        **({} if tokens_seen is None else {"tokens_seen": tokens_seen}),
        "seed": config.seed,
        "data": dict(data),
        "recipe": recipe,
        "config": config_values(config),
        "layout": dict(layout),
        "versions": versions(),
    }


def check_metadata(metadata: Mapping[str, Any], step: int, folder: str) -> None:
    """Raises `ValueError` unless the metadata of a step, which are untrusted input, are what a run saves."""
    problem = _metadata_problem(metadata, step)
    if problem:
        raise ValueError(
            f"A run can only resume from a step that `meshpipe train` saved. Got step {step} in {folder}: {problem}. "
            "Name another step."
        )


def _metadata_problem(metadata: Mapping[str, Any], step: int) -> str | None:
    if metadata.get("step") != step or not is_count(metadata["step"]):
        return f"its metadata name step {metadata.get('step')!r:.40}"
    if not is_count(metadata.get("left_out", 0), step + 1):
        return f"the number of updates left out is {metadata.get('left_out')!r:.40}"
    if not is_count(metadata.get("tokens_seen", 0)):
        return f"the number of tokens is {metadata.get('tokens_seen')!r:.40}"
    data, config = metadata.get("data"), metadata.get("config")
    if not isinstance(data, dict) or not is_count(data.get("examples")):
        return f"the position in the data is {data.get('examples') if isinstance(data, dict) else data!r:.40}"
    if not isinstance(config, dict) or not all(isinstance(config.get(part) or {}, dict) for part in MAY_CHANGE):
        return "its config is not the config of a run"
    return None
