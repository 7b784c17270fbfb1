"""Finds where a run starts: from scratch, from its own newest checkpoint, or from weights that are there."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshpipe.adapters.config import LoraConfig
from meshpipe.checkpoint import Checkpointer
from meshpipe.checkpoint.base import base_of
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.checkpoint.lock import check_free
from meshpipe.checkpoint.names import CHECKPOINTS
from meshpipe.checkpoint.reader import outline_problems
from meshpipe.config import Config
from meshpipe.data.same_tokenizer import other_tokenizer
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder
from meshpipe.layers.shared import FACTORS
from meshpipe.processes.coordination import all_gather, process_count
from meshpipe.runs.continues import check_continues
from meshpipe.runs.record import check_metadata
from meshpipe.runs.run_folder import used_by
from meshpipe.runs.saved_base import base_step
from meshpipe.runs.saved_model import saved_lora
from meshpipe.runs.start import WAIT_SECONDS, Start, damaged
from meshpipe.weights import WeightsFolder, is_published
from meshpipe.weights.architectures import differences
from meshpipe.weights.companions import PRETRAINED
from meshpipe.weights.peft_adapters import PeftAdapters


def find_start(config: Config, base: str | None = None) -> Start | None:
    """The checkpoint that the config asks to start from, which has all its files; None to start from scratch. `base` is
    a folder for what it leaves out, in place of the one that its run had.

    Only what is written down of it is read. Its arrays are read, and compared with their checksums, by `Start.read`.
    Raises `ValueError` when a required checkpoint is missing, belongs to another run, or would mix with a new run. All
    processes raise the same error.
    """
    own = _own_start(config)
    if own is not None:
        return _with_base(own, config, base)
    if config.checkpoint.init_from is None:
        return None
    options, folder = config.checkpoint, config.checkpoint.init_from
    if is_published(folder):
        _check_shared("init_from", "published weights")
        return _published_start(config, folder)
    if options.init_base is not None:
        raise ArgumentError(
            f"`init_base` is for adapters of PEFT. Got it with {folder!r}, which has none. Leave it out."
        )
    steps = Checkpointer(folder).steps()
    if not steps and (inside := Checkpointer(Path(folder) / CHECKPOINTS).steps()):  # it is a `run_dir`
        folder, steps = str(Path(folder) / CHECKPOINTS), inside
    _check_shared("init_from", f"steps {steps}")
    if not steps:
        raise ArgumentError(
            f"`init_from` must name a folder with a complete checkpoint. Got {folder!r}, which has none, and no "
            "published weights either (config.json with files of safetensors)."
        )
    step = steps[-1] if options.init_step is None else options.init_step
    metadata = _read(folder, step, steps, "init_step")
    if options.init_what == "all":
        check_metadata(metadata, step, folder)
        check_continues(config, metadata, folder)
        if step >= config.steps:
            raise ArgumentError(
                f"`steps` must be above the step that a run continues from. Got {config.steps}, and {step}."
            )
    weights_only, before = options.init_what == "weights", saved_param_dtype(metadata)
    converts = weights_only and getattr(config.model, "param_dtype", before) != before
    rounded = "Its float32 weights are rounded to bfloat16." if converts and before == "float32" else ""
    other_scale = _other_scale(config.lora, saved_lora(metadata, Path(folder)), Checkpointer(folder).leaves(step))
    said = (rounded, other_scale, other_tokenizer(config.data, Path(folder) / PRETRAINED))
    start = Start(
        folder,
        step,
        metadata,
        is_own=False,
        argument="init_step",
        weights_only=weights_only,
        converts=converts,
        warnings=tuple(sentence for sentence in said if sentence),
    )
    return _with_base(start, config, base)


def _other_scale(asked: LoraConfig, saved: LoraConfig, leaves: Iterable[str]) -> str:
    """A sentence about adapters that a run begins with and scales otherwise; empty where it does not."""
    if not (asked.rank and saved.rank):
        return ""
    for key in leaves:
        module = key.removeprefix("params/").removesuffix(f"/{FACTORS[0]}")
        if key.endswith(FACTORS[0]) and saved.size_of(module)[1] != asked.size_of(module)[1]:
            return (
                f"Its adapters had the scale {saved.size_of(module)[1]:g}, and have {asked.size_of(module)[1]:g} here, "
                f"as at {module}: another alpha, rank or groups."
            )
    return ""


def saved_param_dtype(metadata: Mapping[str, Any]) -> str:
    """The dtype that a run kept the parameters of its model in; older versions had one."""
    config = metadata.get("config")
    model = config.get("model") if isinstance(config, dict) else None
    return str(model.get("param_dtype", "float32")) if isinstance(model, dict) else "float32"


def _published_start(config: Config, folder: str) -> Start:
    """The start with published weights."""
    for name, is_given in {
        "init_step": config.checkpoint.init_step is not None,
        "init_what": config.checkpoint.init_what != "weights",
    }.items():
        if is_given:
            raise ArgumentError(
                f"`{name}` is for checkpoints of a run. Got it with {folder!r}, a folder of published weights. Leave "
                "it out."
            )
    start = _published(folder, config.checkpoint.init_base)
    assert start.published is not None
    if start.published.adapters is not None:
        _check_adapters(start.published.adapters, config.lora)
    said = (
        start.published.rounded_to(getattr(config.model, "param_dtype", "float32")),
        start.published.without_dropout,
        start.published.generation.notes("It is kept beside the checkpoints as it is."),
        other_tokenizer(config.data, start.published.folder),
    )
    warnings = tuple(sentence for sentence in said if sentence)
    return replace(start, differences=differences(config.model, start.published.model), warnings=warnings)


def _check_adapters(found: PeftAdapters, asked: LoraConfig) -> None:
    """Raises `ArgumentError` for a run whose adapters are of another size than those that it begins with."""
    if not asked.rank or any(found.lora.size_of(path) != asked.size_of(path) for path in found.modules):
        raise ArgumentError(
            f"A run that begins with adapters must have such adapters. Got {found.folder} for a run with `lora.rank` "
            f"{asked.rank} and `lora.alpha` {asked.alpha:g}. {found.flags()}"
        )


def _published(folder: str, base: str | None = None) -> Start:
    """Raises `ArgumentError` when processes see different weights, and `WeightsError` for damaged ones."""
    found = WeightsFolder(folder, base, "init_base")
    check_same_weights(found, "`init_from`")
    if found.adapters is not None:
        folder = str(found.folder)  # that of the base, which checkpoints of adapters leave out
    return Start(folder, 0, {}, is_own=False, argument="init_from", weights_only=True, published=found)


_comparisons = itertools.count()


def check_same_weights(found: WeightsFolder, argument: str) -> None:
    """Raises `ArgumentError` when processes see different weights. Every process calls it, in the same order."""
    if process_count() > 1:
        seen = all_gather(f"meshpipe/weights/{next(_comparisons)}", found.outline(), WAIT_SECONDS)
        others = [str(process) for process, text in enumerate(seen) if text != seen[0]]
        if others:
            raise ArgumentError(
                f"All processes must see the same {argument}. Got {str(found.folder)!r}, whose files differ between "
                f"process 0 and {', '.join(others)}. Name a folder on a file system that they share, or copy all files "
                "to each machine."
            )


def _with_base(start: Start, config: Config, base_folder: str | None) -> Start:
    """The start with what its step leaves out. Raises `ArgumentError` when that cannot be had."""
    left_out = base_of(start.metadata)
    if left_out is None:
        return start
    asked = config.checkpoint.init_from if start.is_own else base_folder
    if asked is not None and not _is_whole(asked):
        asked = None  # the checkpoint of adapters that this run began with: its base is that of this one
    if asked is None and left_out.folder is None:
        if left_out.seed != config.seed:
            raise ArgumentError(
                f"Step {start.step} of {start.folder} leaves out its {left_out}. Got `seed` {config.seed}, which draws "
                f"others. Pass `seed` {left_out.seed}."
            )
        return replace(start, left_out_base=left_out)
    published = asked if asked is not None and is_published(asked) else None
    if asked is None and left_out.step is None and left_out.folder is not None and is_published(left_out.folder):
        published = left_out.folder
    if published is not None:
        return replace(start, left_out_base=left_out, base=_published(published))
    # A run that begins with this checkpoint has named it as `init_from`, and cannot name the base as well.
    argument = "init_from" if start.is_own else None
    reader, step = base_step(left_out, asked, argument if base_folder is None else "base")
    folder = str(reader.directory)
    metadata = _read(folder, step, reader.steps(), "init_step")
    if base_of(metadata) is not None:
        raise ArgumentError(
            f"A base must be a checkpoint of all parameters. Got step {step} of {folder}, which leaves some out. Pass "
            "the folder of the base as `init_from`."
        )
    # What it is converted to has the digest that the run has saved, or is refused.
    base = Start(folder, step, metadata, is_own=False, argument="init_step", weights_only=True, converts=True)
    return replace(start, left_out_base=left_out, base=base)


def _is_whole(folder: str) -> bool:
    reader = reader_of(folder)
    latest = reader.latest()
    return latest is None or base_of(reader.metadata(latest)) is None


def _own_start(config: Config) -> Start | None:
    options = config.checkpoint
    folder = options.checkpoint_dir
    if folder is None:
        return None
    check_folder("checkpoint_dir", folder)
    check_free(Path(folder).expanduser())
    steps = Checkpointer(folder).steps()
    _check_shared("checkpoint_dir", f"steps {steps}")
    if steps and not options.may_continue:
        raise ArgumentError(
            "A new run needs a `checkpoint_dir` without checkpoints, so that two runs do not mix. "
            f"Got {folder!r}, which holds steps up to {steps[-1]}. Pass `resume` to continue, or name another folder."
        )
    if not steps and (options.auto_resume or not options.may_continue):
        return None
    name = "resume" if options.resume_from is None else "resume_from"
    if not steps:
        raise ArgumentError(_nothing_to_resume(config, name))
    step = steps[-1] if options.resume_from is None else options.resume_from
    metadata = _read(folder, step, steps, "resume_from")
    check_metadata(metadata, step, folder)
    check_continues(config, metadata, folder)
    return Start(folder, step, metadata, is_own=True)


def _nothing_to_resume(config: Config, name: str) -> str:
    """Why a run without a complete checkpoint cannot be resumed, and what its user can do instead."""
    folder, argument = config.checkpoint.checkpoint_dir, "checkpoint_dir"
    if config.run_dir is not None and folder == str(Path(config.run_dir) / CHECKPOINTS):
        folder, argument = config.run_dir, "run_dir"
        if used_by(Path(folder)) is not None:
            return (
                f"`{name}` needs a complete checkpoint in `{argument}`. Got {folder!r}, whose run saved none. To start "
                f"a new run, leave `{name}` out, and name another folder or remove this one."
            )
    return (
        f"`{name}` needs a complete checkpoint in `{argument}`. Got {folder!r}, which has none. "
        f"Name the folder of the run to resume, or leave `{name}` out to start a new one; "
        "`init_from` starts from a checkpoint in another folder."
    )


def _read(folder: str, step: int, steps: Sequence[int], argument: str) -> dict[str, Any]:
    """The metadata of a step, which has all its files in their sizes, and is the same step in every process. Every
    process calls it, in the same order.
    """
    if step not in steps:
        raise ArgumentError(
            f"`{argument}` must name a step that is saved in {folder}. Got {step}. "
            f"Complete steps there: {', '.join(map(str, steps))}."
        )
    reader = Checkpointer(folder)
    problems = outline_problems(reader.folder(step), step)
    if process_count() > 1:
        here = ["" if problems else reader.fingerprint(step), problems]
        said = all_gather(f"meshpipe/step/{next(_comparisons)}", json.dumps(here), WAIT_SECONDS)
        seen, of_all = zip(*map(json.loads, said), strict=True)
        problems = list(dict.fromkeys(itertools.chain(*of_all)))
        others = [str(process) for process, fingerprint in enumerate(seen) if fingerprint != seen[0]]
        if others and not problems:
            raise ArgumentError(
                f"All processes must read the same checkpoint. Got step {step} in {folder!r}, which differs between "
                f"process 0 and {', '.join(others)}. Name a folder on a file system that they share, or copy the step "
                "to each machine."
            )
    if problems:
        raise damaged(folder, step, problems, argument)
    return reader.metadata(step)


def _check_shared(argument: str, seen_here: str) -> None:
    """Raises `ArgumentError` when processes see something else in a folder."""
    if process_count() == 1:
        return
    seen = all_gather(f"meshpipe/{argument}/steps", seen_here, WAIT_SECONDS)
    if len(set(seen)) > 1:
        found = "; ".join(f"{text} in process {process}" for process, text in enumerate(seen))
        raise ArgumentError(
            f"All processes must see the same `{argument}`. Got {found}. "
            "Name a folder on a file system that they share."
        )
