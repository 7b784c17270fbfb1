"""Where a run starts: from scratch, from its own newest checkpoint, or from a checkpoint of another run."""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from meshpipe.adapters.config import LoraConfig
from meshpipe.checkpoint import Checkpointer, CheckpointError, verify_checkpoint
from meshpipe.checkpoint.base import Base, base_of
from meshpipe.checkpoint.index import check_leaf, check_weights, tree_bytes
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.checkpoint.lock import check_free
from meshpipe.checkpoint.names import CHECKPOINTS
from meshpipe.checkpoint.reader import newest_good_step, outline_problems
from meshpipe.checkpoint.restore import restore_or_problems
from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder
from meshpipe.layers.shared import FACTORS
from meshpipe.layers.staged_model import StagedModel
from meshpipe.phases import phase
from meshpipe.processes.coordination import all_gather, process_count, process_index
from meshpipe.processes.group import Group
from meshpipe.processes.printable import printable
from meshpipe.report.tables import format_bytes
from meshpipe.runs.record import MAY_CHANGE, check_metadata, config_values
from meshpipe.runs.run_folder import used_by
from meshpipe.runs.saved_base import base_step, check_digest
from meshpipe.trainer import Trainer
from meshpipe.training.base import digest_of_leaves
from meshpipe.training.state import StartingState, StateTree

WAIT_SECONDS = 1800.0
"""How long processes wait for each other to read a checkpoint."""
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Start:
    """A complete checkpoint that a run starts from."""

    folder: str
    step: int
    metadata: Mapping[str, Any]
    """Its saved metadata."""
    is_own: bool
    """Whether it lies in the run's own folder, so it need not be saved again."""
    argument: str = "resume_from"
    """The argument that names another step to start from."""
    weights_only: bool = False
    """Whether the run begins at step 0 and takes only parameters and other model state."""
    left_out_base: Base | None = None
    """The parameters that the step leaves out because its run did not train them."""
    base: "Start | None" = None
    """Where those are read; None draws them from the seed again."""

    @property
    def left_out(self) -> int:
        return 0 if self.weights_only else int(self.metadata.get("left_out", 0))

    @property
    def tokens_seen(self) -> int | None:
        """Tokens that the run was trained on; None where the checkpoint does not tell."""
        return 0 if self.weights_only else self.metadata.get("tokens_seen")

    def check(self, model: StagedModel) -> None:
        """Raises `CheckpointError` when the weights belong to another model; reads only their shapes."""
        leaves = self._leaves()
        found = {f"params/{path}": leaf for stage in model.parameters for path, leaf in stage.all_params.items()}
        found |= {f"state/{path}": leaf for stage in model.parameters for path, leaf in stage.own_state.items()}
        frozen = {f"params/{path}" for stage in model.parameters for path in stage.frozen}
        from_base = frozen.difference(leaves) if self.left_out_base is not None else frozenset[str]()
        first = self._adapters_without(found, leaves)
        check_weights(
            self.step,
            {key: leaf for key, leaf in found.items() if key not in from_base and key not in first},
            leaves,
            self.folder,
        )
        if self.base is not None:
            of_base = self.base._leaves()
            for key in sorted(from_base):
                check_leaf(self.base.step, key, found[key], of_base)

    def _leaves(self) -> dict[str, dict[str, Any]]:
        return Checkpointer(self.folder).leaves(self.step)

    def _adapters_without(self, found: Iterable[str], leaves: Container[str]) -> frozenset[str]:
        """The adapters of a model that begins with the weights of one without any: they get first values."""
        adapters = frozenset(key for key in found if key.endswith(FACTORS))
        none = not any(key in leaves for key in adapters)
        return adapters if self.weights_only and none else frozenset()

    def read(self, shapes: Sequence[StateTree]) -> StartingState:
        """Reads what the run starts from to the devices of this process, each file once, and compares it with its
        checksum on the way. `shapes` are those of all stages with the optimizer's state.

        Every process of a run calls it. Raises `ArgumentError` in all of them when one finds damage.
        """
        sections = ("params", "state") if self.weights_only else ("params", "state", "optimizer")
        found = self._read_held([{name: tree[name] for name in sections} for tree in shapes], "")
        if self.base is not None and self.left_out_base is not None:
            leaves = self._leaves()
            wanted = [
                {"params": {p: leaf for p, leaf in tree["params"].items() if f"params/{p}" not in leaves}}
                for tree in shapes
            ]
            of_base = self.base._read_held(wanted, "base of ")
            read = {path: leaf for tree in of_base for path, leaf in tree["params"].items()}
            digest = digest_of_leaves(read, Group(range(process_count())))
            check_digest(self.left_out_base, digest, f"step {self.base.step} of {self.base.folder}", "init_from")
            found = [
                {**tree, "params": {**tree["params"], **base["params"]}}
                for tree, base in zip(found, of_base, strict=True)
            ]
        return StartingState(found, 0 if self.weights_only else self.step)

    def check_first_values(self, trainer: Trainer) -> None:
        """Raises `ArgumentError` when parameters that were drawn from the seed are not those that were left out."""
        if self.left_out_base is not None and self.base is None:
            drawn = f"the first values of seed {trainer.seed}, as they are drawn here,"
            check_digest(self.left_out_base, trainer.base_digest(), drawn, "init_from")

    def _read_held(self, shapes: Sequence[StateTree], role: str) -> list[StateTree]:
        """Those of the leaves that the step has."""
        leaves = self._leaves()
        held = [
            {
                name: {p: leaf for p, leaf in part.items() if f"{name}/{p}" in leaves or name == "optimizer"}
                for name, part in tree.items()
            }
            for tree in shapes
        ]
        with phase(f"Reading step {self.step} of {self.folder} ({format_bytes(tree_bytes(held))})"):
            return self._read_intact(lambda: restore_or_problems(Checkpointer(self.folder), self.step, held), role)

    def verify(self) -> None:
        """Reads every byte of the step, a share in each process, for a run that needs none of it. Raises as `read`."""
        share = process_index(), process_count()
        size = format_bytes(Checkpointer(self.folder).bytes_of(self.step))
        with phase(f"Checking step {self.step} in {self.folder} ({size})"):
            self._read_intact(lambda: (None, verify_checkpoint(self.folder, self.step, share=share)))

    def _read_intact(self, read: Callable[[], tuple[_Read, list[str]]], role: str = "") -> _Read:
        """What `read` returns, unless it says in any process what is wrong with files of the step, or fails there."""
        failure = ""
        try:
            found, problems = read()
        except CheckpointError as error:
            if process_count() == 1:
                raise
            failure, problems = str(error), []
        if process_count() > 1:
            said = all_gather(f"meshpipe/{role}{self.argument}/problems", json.dumps([failure, problems]), WAIT_SECONDS)
            of_all = [json.loads(text) for text in said]
            problems = sorted({problem for _, found_there in of_all for problem in found_there})
            failure = next((failed for failed, _ in of_all if failed), "")
        if problems:
            raise _damaged(self.folder, self.step, problems, self.argument)
        if failure:
            raise CheckpointError(printable(failure))
        return found

    def __str__(self) -> str:
        base = "" if self.base is None else f" Its base is step {self.base.step} of {self.base.folder}."
        return f"{self._sentence()}{base}"

    def _sentence(self) -> str:
        if self.is_own:
            return f"Resumed after step {self.step} of {self.folder}."
        if self.weights_only:
            return f"Started with the weights of step {self.step} of {self.folder}."
        return f"Continued after step {self.step} of {self.folder}."


def find_start(config: Config) -> Start | None:
    """The checkpoint that the config asks to start from, which has all its files; None to start from scratch.

    Only what is written down of it is read. Its arrays are read, and compared with their checksums, by `Start.read`.
    Raises `ValueError` when a required checkpoint is missing, belongs to another run, or would mix with a new run. All
    processes raise the same error.
    """
    own = _own_start(config)
    if own is not None:
        return _with_base(own, config)
    if config.checkpoint.init_from is None:
        return None
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
    start = Start(
        folder,
        step,
        metadata,
        is_own=False,
        argument="init_step",
        weights_only=options.init_what == "weights",
    )
    return _with_base(start, config)


def _with_base(start: Start, config: Config) -> Start:
    """The start with what its step leaves out. Raises `ArgumentError` when that cannot be had."""
    left_out = base_of(start.metadata)
    if left_out is None:
        return start
    asked = config.checkpoint.init_from if start.is_own else None
    if asked is not None and not _is_whole(asked):
        asked = None  # the checkpoint of adapters that this run began with: its base is that of this one
    if asked is None and left_out.folder is None:
        if left_out.seed != config.seed:
            raise ArgumentError(
                f"Step {start.step} of {start.folder} leaves out its {left_out}. Got `seed` {config.seed}, which draws "
                f"others. Pass `seed` {left_out.seed}."
            )
        return replace(start, left_out_base=left_out)
    # A run that begins with this checkpoint has named it as `init_from`, and cannot name the base as well.
    reader, step = base_step(left_out, asked, "init_from" if start.is_own else None)
    folder = str(reader.directory)
    metadata = _read(folder, step, reader.steps(), "init_step")
    if base_of(metadata) is not None:
        raise ArgumentError(
            f"A base must be a checkpoint of all parameters. Got step {step} of {folder}, which leaves some out. Pass "
            "the folder of the base as `init_from`."
        )
    base = Start(folder, step, metadata, is_own=False, argument="init_step", weights_only=True)
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
    """The metadata of a step, which has all its files in their sizes."""
    if step not in steps:
        raise ArgumentError(
            f"`{argument}` must name a step that is saved in {folder}. Got {step}. "
            f"Complete steps there: {', '.join(map(str, steps))}."
        )
    reader = Checkpointer(folder)
    problems = outline_problems(reader.folder(step), step)
    if problems:
        raise _damaged(folder, step, problems, argument)
    return reader.metadata(step)


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


def _damaged(folder: str, step: int, problems: Sequence[str], argument: str) -> ArgumentError:
    good = newest_good_step(Checkpointer(folder).directory, but=step)
    way_out = (
        "All other steps there are damaged." if good is None else f"Pass `{argument}` {good}, the newest intact step."
    )
    return ArgumentError(
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
    _check_trained(saved, asked, folder)
    for part, may_change in MAY_CHANGE.items():
        before, now = saved.get(part) or {}, asked[part]
        for name in sorted((before.keys() | now.keys()) - may_change):
            if before.get(name) != now.get(name):
                raise ArgumentError(
                    f"A resumed run must keep its {part}. Got {name} {now.get(name)!r}, and {folder} was saved with "
                    f"{before.get(name)!r}. Restore it, or start a new run in another `checkpoint_dir`."
                )


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
