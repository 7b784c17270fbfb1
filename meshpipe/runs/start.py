"""Where a run starts: from a checkpoint of its own or of another run, or from published weights."""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from meshpipe.checkpoint import Checkpointer, CheckpointError, verify_checkpoint
from meshpipe.checkpoint.base import Base
from meshpipe.checkpoint.index import check_leaf, check_weights, tree_bytes
from meshpipe.checkpoint.reader import newest_good_step
from meshpipe.checkpoint.restore import restore_or_problems
from meshpipe.errors import ArgumentError
from meshpipe.layers.shared import FACTORS
from meshpipe.layers.staged_model import StagedModel
from meshpipe.phases import phase
from meshpipe.processes.coordination import all_gather, process_count, process_index
from meshpipe.processes.group import Group
from meshpipe.processes.printable import printable
from meshpipe.report.tables import format_bytes
from meshpipe.runs.saved_base import check_digest
from meshpipe.trainer import Trainer
from meshpipe.training.base import digest_of_leaves
from meshpipe.training.state import StartingState, StateTree
from meshpipe.weights import WeightsError, WeightsFolder
from meshpipe.weights.companions import keep_companions

WAIT_SECONDS = 1800.0
"""How long processes wait for each other to read a checkpoint."""
_Read = TypeVar("_Read")


@dataclass(frozen=True)
class Start:
    """A complete checkpoint, or a folder of published weights, that a run starts from."""

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
    published: WeightsFolder | None = None
    """The weights, where `folder` is not one of checkpoints."""
    differences: Sequence[str] = ()
    """What the run's model computes otherwise than the published one, in words."""
    converts: bool = False
    """Whether the model may keep weights in bfloat16 that were saved in float32, and the other way."""
    warnings: Sequence[str] = ()
    """What a user should know of how weights and data are read, in sentences."""

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
        if self.published is not None:
            self.published.check({_path(key): leaf for key, leaf in found.items() if key not in first})
            return
        check_weights(
            self.step,
            {key: leaf for key, leaf in found.items() if key not in from_base and key not in first},
            leaves,
            self.folder,
            converts=self.converts,
        )
        if self.base is not None:
            self.base._check_base({key: found[key] for key in sorted(from_base)})

    def _check_base(self, wanted: Mapping[str, Any]) -> None:
        """Raises `ValueError` unless it has these leaves of another model."""
        if self.published is not None:
            self.published.check({_path(key): leaf for key, leaf in wanted.items()}, whole=False)
            return
        leaves = self._leaves()
        for key, leaf in wanted.items():
            check_leaf(self.step, key, leaf, leaves, converts=self.converts)

    def _leaves(self) -> Mapping[str, dict[str, Any]]:
        """What is there, by key."""
        if self.published is not None:
            return {f"params/{path}": {} for path in self.published.leaves}
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
            check_digest(self.left_out_base, digest, self.base.place, "init_from")
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
        with phase(f"Reading {self.place} ({format_bytes(tree_bytes(held))})"):
            if (published := self.published) is not None:
                return self._read_intact(lambda: (_read_published(published, held), []), role)
            reader = Checkpointer(self.folder)
            return self._read_intact(lambda: restore_or_problems(reader, self.step, held, converts=self.converts), role)

    def keep_companions(self, checkpoints: Path) -> None:
        """Copies the tokenizer and the config.json of published weights that this run began with, if it did."""
        if process_index() == 0:
            keep_companions(Path(self.folder) if self.published is None else self.published, checkpoints)

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
        except (CheckpointError, WeightsError) as error:
            if process_count() == 1:
                raise
            failure, problems = str(error), []
        if process_count() > 1:
            said = all_gather(f"meshpipe/{role}{self.argument}/problems", json.dumps([failure, problems]), WAIT_SECONDS)
            of_all = [json.loads(text) for text in said]
            problems = sorted({problem for _, found_there in of_all for problem in found_there})
            failure = next((failed for failed, _ in of_all if failed), "")
        if problems:
            raise damaged(self.folder, self.step, problems, self.argument)
        if failure:
            raise CheckpointError(printable(failure))
        return found

    def __str__(self) -> str:
        base = "" if self.base is None else f" Its base is {self.base.place}."
        other = ""
        if self.published is not None and self.differences:
            other = f" The model differs from its config.json: {'; '.join(self.differences)}."
        other += "".join(f" {sentence}" for sentence in self.warnings)
        return f"{self._sentence()}{base}{other}"

    @property
    def origin(self) -> dict[str, Any]:
        """For the metrics of a run that begins with it."""
        step = {} if self.published is not None else {"step": self.step}
        return {"folder": self.folder, **step, "what": "weights" if self.weights_only else "all"}

    @property
    def place(self) -> str:
        if self.published is None:
            return f"step {self.step} of {self.folder}"
        return self.folder if self.published.adapters is None else self.published.place

    def _sentence(self) -> str:
        if self.is_own:
            return f"Resumed after step {self.step} of {self.folder}."
        if self.weights_only:
            return f"Started with the weights of {self.place}."
        return f"Continued after step {self.step} of {self.folder}."


def _path(key: str) -> str:
    """The leaf path of a key, which has the section before it."""
    return key.partition("/")[2]


def _read_published(folder: WeightsFolder, trees: Sequence[StateTree]) -> list[StateTree]:
    """The parameters of all stages. No two stages own one path."""
    found = folder.read({path: leaf for tree in trees for path, leaf in tree["params"].items()})
    return [{"params": {path: found[path] for path in tree["params"] if path in found}} for tree in trees]


def damaged(folder: str, step: int, problems: Sequence[str], argument: str) -> ArgumentError:
    good = newest_good_step(Checkpointer(folder).directory, but=step)
    way_out = (
        "All other steps there are damaged." if good is None else f"Pass `{argument}` {good}, the newest intact step."
    )
    return ArgumentError(
        f"A run can only start from an intact checkpoint. Got step {step} in {folder}, which is damaged: "
        f"{printable('; '.join(problems[:3]))}. {way_out}"
    )
