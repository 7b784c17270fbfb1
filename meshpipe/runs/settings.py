"""Descriptions of a run's settings and data, compared across processes before anything is compiled."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from meshpipe.compiler.digest import ADDRESS, digest
from meshpipe.config import Config
from meshpipe.data import Source
from meshpipe.processes.agreement import HASH
from meshpipe.runs.record import config_values

FILES = {
    "run_dir",
    "metrics",
    "trace",
    "track_dir",
    "profile_dir",
    "compile_cache",
    "checkpoint_dir",
    "init_from",
    "costs",
}
"""Fields that name files and folders. Only their presence is compared, since paths may differ between machines."""
WITH_PREFIX = {"mesh", "model", "data", "lora"}
"""Parts of a config whose name prefixes their flags."""


def describe_config(config: Config) -> dict[str, str]:
    """Every setting of a run by its flag, except those that only name a place on one machine."""
    found: dict[str, str] = {}
    for field in dataclasses.fields(config):
        part = getattr(config, field.name)
        if not dataclasses.is_dataclass(part):
            found[_flag(field.name)] = _text(part, field.name in FILES)
            continue
        prefix = f"{field.name}." if field.name in WITH_PREFIX else ""
        for name, value in _flat(part):
            is_file = name in FILES or (_is_path(value) and (field.name == "data" or name == "schedule"))
            found[_flag(prefix + name)] = _text(value, is_file)
    found["kind of model"] = type(config.model).__qualname__
    found["kind of data"] = type(config.data).__qualname__
    # Only process 0 writes it.
    del found["--metrics"]
    return found


def describe_source(name: str, source: Source | None) -> dict[str, str]:
    """Identifies the data by its repr, its length and some of its examples."""
    if source is None:
        return {}
    length = len(source)
    places = sorted({0, length // 2, length - 1}) if length else []
    examples = [{field: np.asarray(value) for field, value in source[place].items()} for place in places]
    return {
        f"{name} data": ADDRESS.sub("", repr(source)),
        f"length of the {name} data": str(length),
        f"examples of the {name} data": HASH + digest(examples),
    }


def _flat(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            found += _flat(value, f"{prefix}{field.name}.")
        else:
            found.append((prefix + field.name, value))
    return found


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and os.sep in value


def _text(value: Any, is_file: bool) -> str:
    if is_file:
        return "none" if value is None else "a path"
    if isinstance(value, bool | int | float | str | None | tuple | list | Mapping):
        return str(config_values(value))
    return HASH + digest(value)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
