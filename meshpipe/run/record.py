"""What is written down about a run, in metrics and checkpoints, and whether a saved run can be gone on with."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from meshpipe.checkpoint import Checkpointer, verify_checkpoint
from meshpipe.config import Config
from meshpipe.data.batches import ADDRESS
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder
from meshpipe.host import versions
from meshpipe.processes.coordination import process_count, process_index, tell_all

MAY_CHANGE: Mapping[str, frozenset[str]] = {
    "model": frozenset(),
    "optimizer": frozenset({"learning_rate", "warmup_steps", "decay", "weight_decay", "clip_norm"}),
}
"""Fields that may differ when a run is gone on with: they change what it does next, not what was saved."""

RESUME_SECONDS = 1800.0
"""How long processes wait for each other to read a checkpoint."""


def config_values(config: Any) -> Any:
    """A configuration as nested dicts of what JSON can hold; the model and the data also say their `type`."""
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
    return config if config is None or isinstance(config, bool | int | float | str) else _describe(config)


def _describe(value: Any) -> str:
    """A value in words that are the same in every run; a function is its name, not its address."""
    if isinstance(value, functools.partial):
        keywords = {name: config_values(part) for name, part in value.keywords.items()}
        return f"{_describe(value.func)}{(*map(config_values, value.args),)}{keywords or ''}"
    if callable(value) and not isinstance(value, type) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value)


def check_can_be_saved(config: Config) -> None:
    """Raises `ArgumentError` when the config would be written down with what is another in every run, so that no
    checkpoint of it could be gone on with.
    """
    values = config_values(config)
    for part in MAY_CHANGE:
        for name, value in values[part].items():
            if ADDRESS.search(text := json.dumps(value)):
                raise ArgumentError(
                    f"A config must have the same text in every run, since a resumed run is compared by it. Got {text} "
                    f"for {name} of the {part}. Give its class a __repr__, or leave `checkpoint_dir` out."
                )


def layout_values(
    config: Config, stages: Sequence[range], schedule: str | None = None, remat: Sequence[str] = ()
) -> dict[str, Any]:
    """Mesh axes, schedule, rematerialisation and the layers of every stage, as they are where the config leaves them
    open.

    `schedule` is the name of the plan and `remat` has a name for every stage; they are taken where the config says
    `auto`.
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


def device_names(devices: Iterable[jax.Device]) -> list[str]:
    """The devices as `platform:id`, with their kind where it says more than the platform."""
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
) -> dict[str, Any]:
    """What is saved beside the arrays; `layout` is that of the run, `data` the position in the training data, and
    `left_out` the number of updates that were left out until then.
    """
    return {
        "step": step,
        "left_out": left_out,
        "seed": config.seed,
        "data": dict(data),
        "recipe": recipe,
        "config": config_values(config),
        "layout": dict(layout),
        "versions": versions(),
    }


def saved_run(config: Config) -> dict[str, Any] | None:
    """Metadata of the checkpoint to go on from, where a run is asked to and there is one; None for a new run.

    Raises `ValueError` when there is none but has to be, when it is of another run, and when a new run would mix with
    it. Of a run of several processes, all raise the same.
    """
    options = config.checkpoint
    folder = options.checkpoint_dir
    if folder is None:
        return None
    check_folder("checkpoint_dir", folder)
    checkpointer = Checkpointer(folder)
    steps = checkpointer.steps()
    _check_shared(folder, steps)
    if steps and not options.may_continue:
        raise ValueError(
            "A new run needs a --checkpoint-dir without checkpoints, so that two runs do not mix. "
            f"Got {folder!r}, which holds steps up to {steps[-1]}. Pass --resume to go on, or name another folder."
        )
    if not steps and (options.auto_resume or not options.may_continue):
        return None
    flag = "--resume" if options.resume_from is None else "--resume-from"
    if not steps:
        raise ValueError(
            f"{flag} needs a whole checkpoint in --checkpoint-dir. Got {folder!r}, which has none. "
            f"Name the folder of the run to go on with, or leave {flag} out to start a new one."
        )
    step = steps[-1] if options.resume_from is None else options.resume_from
    if step not in steps:
        raise ValueError(
            f"--resume-from must name a step that is saved in {folder}. Got {step}. "
            f"Whole steps there: {', '.join(map(str, steps))}."
        )
    _check_whole(folder, step, steps)
    metadata = checkpointer.metadata(step)
    check_continues(config, metadata, folder)
    return metadata


def _check_shared(folder: str, steps: Sequence[int]) -> None:
    """Raises `ValueError` when processes see different checkpoints."""
    if process_count() == 1:
        return
    seen = tell_all("meshpipe/resume/steps", json.dumps(steps), RESUME_SECONDS)
    if len(set(seen)) > 1:
        found = "; ".join(f"steps {text} in process {process}" for process, text in enumerate(seen))
        raise ValueError(
            f"All processes must see the same --checkpoint-dir. Got {found}. "
            "Name a folder of a file system that they share."
        )


def _check_whole(folder: str, step: int, steps: Sequence[int]) -> None:
    """Reads every byte of a step, each process its share, since a damaged one should not be found only after a long
    compilation.
    """
    problems = verify_checkpoint(folder, step, share=(process_index(), process_count()))
    if process_count() > 1:
        told = tell_all("meshpipe/resume/problems", json.dumps(problems), RESUME_SECONDS)
        problems = sorted({problem for text in told for problem in json.loads(text)})
    if not problems:
        return
    good = next((other for other in reversed(steps) if other != step and not verify_checkpoint(folder, other)), None)
    way_out = (
        "No other step there is good." if good is None else f"Pass --resume-from {good}, the newest step that is good."
    )
    raise ValueError(
        f"To go on, a run needs a whole checkpoint. Got step {step} in {folder}, which is damaged: "
        f"{'; '.join(problems[:3])}. {way_out}"
    )


def check_continues(config: Config, metadata: Mapping[str, Any], folder: str) -> None:
    """Raises `ValueError` when what is asked is another run than the saved one, so that it could not go on with it.

    Layout, schedule, partition, microbatches, number of steps, learning rate and how often to save may change. Model,
    kind of optimizer, seed and batch size may not. Whether the data fits, its own saved position says.
    """
    saved = metadata.get("config", {})
    asked = json.loads(json.dumps(config_values(config)))
    for name in ("seed", "batch_size"):
        if saved.get(name) != asked[name]:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"A resumed run must keep its {flag}, so that its next batch is the one that would have come. "
                f"Got {asked[name]}, and {folder} was saved with {saved.get(name)}. "
                f"Pass {flag} {saved.get(name)}, or start a new run in another --checkpoint-dir."
            )
    for part, may_change in MAY_CHANGE.items():
        before, now = saved.get(part) or {}, asked[part]
        for name in sorted((before.keys() | now.keys()) - may_change):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"A resumed run must keep its {part}. Got {name} {now.get(name)!r}, and {folder} was saved with "
                    f"{before.get(name)!r}. Restore it, or start a new run in another --checkpoint-dir."
                )
