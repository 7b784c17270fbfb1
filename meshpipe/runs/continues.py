"""Whether a config continues the run that a checkpoint is of."""

import json
from collections.abc import Mapping
from typing import Any

from meshpipe.adapters.config import LoraConfig
from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.runs.record import MAY_CHANGE, config_values


def check_continues(config: Config, metadata: Mapping[str, Any], folder: str) -> None:
    """Raises `ValueError` when the config describes another run than the saved one, so it cannot continue it.

    Layout, schedule, partition, microbatches, number of steps, learning rate and how often to save may change. Model,
    kind of optimizer, seed and batch size may not. The data is checked later, by its saved position.
    """
    saved = dict(metadata.get("config", {}))
    saved["lora"] = _saved_lora(saved.get("lora") or {})
    asked = json.loads(json.dumps(config_values(config)))
    for name in ("seed", "batch_size"):
        if saved.get(name) != asked[name]:
            raise ArgumentError(
                f"A resumed run must keep its `{name}`, so that it continues with the right batch. "
                f"Got {asked[name]}, and {folder} was saved with {saved.get(name)}. "
                f"Pass `{name}` {saved.get(name)}, or start a new run in another `checkpoint_dir`."
            )
    _check_trained(saved, asked, folder)
    for part, may_change in MAY_CHANGE.items():
        before, now = saved.get(part) or {}, asked[part]
        for name in sorted((before.keys() | now.keys()) - may_change):
            if before.get(name) != now.get(name):
                raise ArgumentError(
                    f"A resumed run must keep its {part}. Got {name} {now.get(name)!r}, and {folder} was saved with "
                    f"{before.get(name)!r}. Restore it, or start a new run in another `checkpoint_dir`."
                )


def _saved_lora(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The adapters that were saved; older versions had none, or no groups, and an empty list for all targets."""
    made = {**json.loads(json.dumps(config_values(LoraConfig()))), **lora}
    return {**made, "targets": made["targets"] or None}


def _check_trained(saved: Mapping[str, Any], asked: Mapping[str, Any], folder: str) -> None:
    """Raises `ArgumentError` when the optimizer's state would be that of other parameters or groups."""
    if (before := saved.get("trainable")) != asked["trainable"]:
        given = "all, or the adapters" if before is None else " ".join(before)
        raise ArgumentError(
            "A resumed run must train what it has trained, since the optimizer has state for it. Got `trainable` "
            f"{'unset' if asked['trainable'] is None else ' '.join(asked['trainable'])}, and {folder} was saved with "
            f"{given}. Restore it, or start a new run in another `checkpoint_dir` with `init_from` {folder}, whose "
            "optimizer begins anew."
        )
    was, now = (_groups(values.get("optimizer")) for values in (saved, asked))
    if was != now:
        raise ArgumentError(
            "The groups of a resumed run may change their learning rate and weight decay, and nothing else, since the "
            f"optimizer has state for each. Got `groups` {_spell(now)}, and {folder} was saved with {_spell(was)}. "
            f"Restore them, or start a new run in another `checkpoint_dir` with `init_from` {folder}, whose optimizer "
            "begins anew."
        )


def _groups(optimizer: Any) -> list[tuple[Any, Any]]:
    """What the shape of the optimizer's state depends on: patterns and kinds."""
    found = optimizer.get("groups") if isinstance(optimizer, dict) else None
    kind = optimizer.get("optimizer") if isinstance(optimizer, dict) else None
    groups = [group for group in found if isinstance(group, dict)] if isinstance(found, list) else []
    return [(group.get("pattern"), group.get("optimizer") or kind) for group in groups]


def _spell(groups: list[tuple[Any, Any]]) -> str:
    return ", ".join(f"{pattern} ({kind})" for pattern, kind in groups) or "none"
