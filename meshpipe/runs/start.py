"""Where a run starts: from scratch, from its own newest checkpoint, or from a checkpoint of another run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshpipe.adapters.config import LoraConfig
from meshpipe.checkpoint import Checkpointer, verify_checkpoint
from meshpipe.checkpoint.index import check_weights, tree_bytes
from meshpipe.checkpoint.lock import check_free
from meshpipe.checkpoint.names import CHECKPOINTS
from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder
from meshpipe.layers.staged_model import StagedModel
from meshpipe.phases import phase
from meshpipe.processes.coordination import all_gather, process_count, process_index
from meshpipe.processes.printable import printable
from meshpipe.report.tables import format_bytes
from meshpipe.runs.record import MAY_CHANGE, check_metadata, config_values
from meshpipe.runs.run_folder import used_by
from meshpipe.trainer import Trainer

WAIT_SECONDS = 1800.0
"""How long processes wait for each other to read a checkpoint."""


@dataclass(frozen=True)
class Start:
    """A complete checkpoint that a run starts from."""

    folder: str
    step: int
    metadata: Mapping[str, Any]
    """Its saved metadata."""
    is_own: bool
    """Whether it lies in the run's own folder, so it need not be saved again."""
    weights_only: bool = False
    """Whether the run begins at step 0 and takes only parameters and other model state."""

    @property
    def left_out(self) -> int:
        return 0 if self.weights_only else int(self.metadata.get("left_out", 0))

    @property
    def tokens_seen(self) -> int | None:
        """Tokens that the run was trained on; None where the checkpoint does not tell."""
        return 0 if self.weights_only else self.metadata.get("tokens_seen")

    def check(self, model: StagedModel) -> None:
        """Raises `CheckpointError` when the weights belong to another model; reads only their shapes."""
        leaves = Checkpointer(self.folder).leaves(self.step)
        found = {f"params/{path}": leaf for stage in model.parameters for path, leaf in stage.params.items()}
        found |= {f"state/{path}": leaf for stage in model.parameters for path, leaf in stage.state.items()}
        check_weights(self.step, found, leaves, self.folder)

    def load(self, trainer: Trainer) -> str:
        """Loads the checkpoint into the trainer, and returns a sentence about it."""
        shapes = trainer.abstract_state_tree(optimizer=not self.weights_only)
        size = format_bytes(tree_bytes(shapes))
        with phase(f"Reading step {self.step} of {self.folder} ({size})"):
            trees = Checkpointer(self.folder).restore(self.step, shapes)
            trainer.load_state_tree(trees, 0 if self.weights_only else self.step, donate=True)
        if self.is_own:
            return f"Resumed after step {self.step} of {self.folder}."
        if self.weights_only:
            return f"Started with the weights of step {self.step} of {self.folder}."
        return f"Continued after step {self.step} of {self.folder}."


def find_start(config: Config) -> Start | None:
    """The checkpoint that the config asks to start from, after a check of all its bytes; None to start from scratch.

    Raises `ValueError` when a required checkpoint is missing, belongs to another run, or would mix with a new run. All
    processes raise the same error.
    """
    own = _own_start(config)
    if own is not None or config.checkpoint.init_from is None:
        return own
    options, folder = config.checkpoint, config.checkpoint.init_from
    steps = Checkpointer(folder).steps()
    if not steps and (inside := Checkpointer(Path(folder) / CHECKPOINTS).steps()):  # it is a `run_dir`
        folder, steps = str(Path(folder) / CHECKPOINTS), inside
    _check_shared("init_from", folder, steps)
    if not steps:
        raise ArgumentError(
            f"`init_from` must name a folder with a complete checkpoint. Got {folder!r}, which has none."
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
    return Start(folder, step, metadata, is_own=False, weights_only=options.init_what == "weights")


def _own_start(config: Config) -> Start | None:
    options = config.checkpoint
    folder = options.checkpoint_dir
    if folder is None:
        return None
    check_folder("checkpoint_dir", folder)
    check_free(Path(folder).expanduser())
    steps = Checkpointer(folder).steps()
    _check_shared("checkpoint_dir", folder, steps)
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
    """The metadata of a step, after all its bytes were checked."""
    if step not in steps:
        raise ArgumentError(
            f"`{argument}` must name a step that is saved in {folder}. Got {step}. "
            f"Complete steps there: {', '.join(map(str, steps))}."
        )
    _check_whole(folder, step, steps, argument)
    return Checkpointer(folder).metadata(step)


def _check_shared(argument: str, folder: str, steps: Sequence[int]) -> None:
    """Raises `ArgumentError` when processes see different checkpoints."""
    if process_count() == 1:
        return
    seen = all_gather(f"meshpipe/{argument}/steps", json.dumps(steps), WAIT_SECONDS)
    if len(set(seen)) > 1:
        found = "; ".join(f"steps {text} in process {process}" for process, text in enumerate(seen))
        raise ArgumentError(
            f"All processes must see the same `{argument}`. Got {found}. "
            "Name a folder on a file system that they share."
        )


def _check_whole(folder: str, step: int, steps: Sequence[int], argument: str) -> None:
    """Checks every byte of a step, a share in each process. Damage is thus found before a long compilation, not
    after it.
    """
    size = format_bytes(Checkpointer(folder).bytes_of(step))
    with phase(f"Checking step {step} in {folder} ({size})"):
        problems = verify_checkpoint(folder, step, share=(process_index(), process_count()))
    if process_count() > 1:
        failures = all_gather(f"meshpipe/{argument}/problems", json.dumps(problems), WAIT_SECONDS)
        problems = sorted({problem for text in failures for problem in json.loads(text)})
    if not problems:
        return
    good = next((other for other in reversed(steps) if other != step and not verify_checkpoint(folder, other)), None)
    way_out = (
        "All other steps there are damaged." if good is None else f"Pass `{argument}` {good}, the newest intact step."
    )
    raise ArgumentError(
        f"A run can only start from an intact checkpoint. Got step {step} in {folder}, which is damaged: "
        f"{printable('; '.join(problems[:3]))}. {way_out}"
    )


def check_continues(config: Config, metadata: Mapping[str, Any], folder: str) -> None:
    """Raises `ValueError` when the config describes another run than the saved one, so it cannot continue it.

    Layout, schedule, partition, microbatches, number of steps, learning rate and how often to save may change. Model,
    kind of optimizer, seed and batch size may not. The data is checked later, by its saved position.
    """
    without = json.loads(json.dumps(config_values(LoraConfig())))
    saved = {"lora": without, **metadata.get("config", {})}  # older versions had no adapters
    asked = json.loads(json.dumps(config_values(config)))
    for name in ("seed", "batch_size"):
        if saved.get(name) != asked[name]:
            raise ArgumentError(
                f"A resumed run must keep its `{name}`, so that it continues with the right batch. "
                f"Got {asked[name]}, and {folder} was saved with {saved.get(name)}. "
                f"Pass `{name}` {saved.get(name)}, or start a new run in another `checkpoint_dir`."
            )
    for part, may_change in MAY_CHANGE.items():
        before, now = saved.get(part) or {}, asked[part]
        for name in sorted((before.keys() | now.keys()) - may_change):
            if before.get(name) != now.get(name):
                raise ArgumentError(
                    f"A resumed run must keep its {part}. Got {name} {now.get(name)!r}, and {folder} was saved with "
                    f"{before.get(name)!r}. Restore it, or start a new run in another `checkpoint_dir`."
                )
