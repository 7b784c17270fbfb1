"""Checkpoints on Orbax: an item per stage, leaves keyed by path, a step listed only once it is whole."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from meshpipe.checksums import CHECKSUMS, differences, write_checksums

Tree = Mapping[str, Mapping[str, Any]]
"""What one stage saves: sections such as `params`, each a flat dict of arrays by leaf path."""
_METADATA = "meta"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or does not fit what is to be restored; the message gives the way out."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and how often a run saves, and whether it goes on from what was saved."""

    checkpoint_dir: str | None = None
    """Folder of the checkpoints, made when missing; None saves nothing."""
    checkpoint_every: int = 0
    """Updates between saves; 0 saves only at the end. The end of a run is always saved when there is a folder."""
    checkpoint_keep: int = 3
    """Newest checkpoints kept; older ones are removed after a save. 0 keeps all."""
    resume: bool = False
    """Go on from the newest checkpoint of the folder; an error when there is none."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "checkpoint_keep"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0. Got {getattr(self, name)}.")
        if self.checkpoint_dir is None:
            for name, asked in (("--resume", self.resume), ("--checkpoint-every", self.checkpoint_every > 0)):
                if asked:
                    raise ValueError(f"{name} needs a folder of checkpoints. Got none: add --checkpoint-dir DIR.")
        elif not self.checkpoint_dir.strip():
            raise ValueError("--checkpoint-dir must name a folder. Got an empty name.")


class Checkpointer:
    """Saves and restores the trees of all stages of a run in one folder.

    A step is written under a temporary name and gets its own when all of its files and their checksums are there.
    Without a trainer::

        with Checkpointer("runs/mine") as checkpointer:
            checkpointer.save(step, [{"params": params}], {"seed": 0})
            trees = checkpointer.restore(step, [{"params": shapes_with_shardings}])

    Nothing is written, not even the folder, before the first `save`. `keep` is the number of newest steps to keep, 0
    for all.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3):
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._items: tuple[str, ...] = ()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(self, step: int, trees: Sequence[Tree], metadata: Mapping[str, Any]) -> None:
        """Copies the arrays, then writes them in the background; they may be donated as soon as this returns.

        `metadata` is anything JSON can hold. Waits for the save before. Raises `CheckpointError` when the step is not
        newer than all that are there, and `OSError` or `ValueError` when the save before this one could not be
        written.
        """
        self.wait()
        newest = self.latest()
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"A checkpoint must be newer than those in the folder. Got step {step}, with step {newest} in "
                f"{self.directory}. "
                "Save into another folder, or resume from the newest."
            )
        index, items = _index(trees)
        arguments = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
        document = {"user": dict(metadata), "leaves": index, "stages": len(trees)}
        json.dumps(document)  # a value that JSON cannot hold must fail before anything is written
        self.directory.mkdir(parents=True, exist_ok=True)
        self._open(tuple(items))
        assert self._orbax is not None
        partial = self.directory / f"{step}.partial"
        self._orbax.save(
            epath.Path(partial), args=ocp.args.Composite(**arguments, **{_METADATA: ocp.args.JsonSave(document)})
        )
        self._writing = self._background.submit(self._commit, self._orbax, partial)

    def restore(self, step: int, abstract: Sequence[Tree]) -> list[dict[str, dict[str, jax.Array]]]:
        """The saved leaves with the shapes, dtypes and shardings of `abstract`, whatever stages and shardings they
        were saved from.

        Only the leaves asked for are read, after their stages' checksums have been compared. Raises `CheckpointError`
        when the step is not there or damaged, or a leaf is missing or has another shape or dtype.
        """
        folder = self._folder(step)
        leaves = self._document(step)["leaves"]
        wanted: dict[tuple[int, str], dict[str, jax.ShapeDtypeStruct]] = {}
        for stage, tree in enumerate(abstract):
            for section, part in tree.items():
                for path, shape in part.items():
                    key = f"{section}/{path}"
                    _check_leaf(step, key, shape, leaves)
                    wanted.setdefault((stage, leaves[key]["item"]), {})[key] = shape
        self._check_bytes(step, sorted({item for _, item in wanted}))
        found: list[dict[str, jax.Array]] = [{} for _ in abstract]
        for (stage, item), shapes in wanted.items():
            found[stage].update(_read(folder / item, shapes))
        return [
            {section: {path: arrays[f"{section}/{path}"] for path in part} for section, part in tree.items()}
            for arrays, tree in zip(found, abstract, strict=True)
        ]

    def steps(self) -> list[int]:
        """Steps that are whole, oldest first."""
        if not self.directory.is_dir():
            return []
        names = (
            p.name
            for p in self.directory.iterdir()
            if re.fullmatch("0|[1-9][0-9]*", p.name) and (p / CHECKSUMS).is_file()
        )
        return sorted(map(int, names))

    def latest(self) -> int | None:
        """The newest whole step, or None."""
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """What the caller of `save` said of the step. Raises `CheckpointError` when it is not there or damaged."""
        return self._document(step)["user"]

    def leaves(self, step: int) -> dict[str, dict[str, Any]]:
        """For each saved leaf, `section/path`, its item, shape and dtype."""
        return self._document(step)["leaves"]

    def wait(self) -> None:
        """Waits until the last save is whole. Raises what went wrong in writing; earlier steps are as they were."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Waits for the last save and lets go of the background threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def _commit(self, orbax: ocp.AsyncCheckpointer, partial: Path) -> None:
        """Gives a written step its final name, then removes the steps beyond `keep`."""
        orbax.wait_until_finished()
        write_checksums(partial)
        partial.rename(partial.with_suffix(""))
        for step in self.steps()[: -self._keep] if self._keep else ():
            # Renamed first, so that no step is listed while it is half deleted.
            shutil.rmtree((self.directory / str(step)).rename(self.directory / f"{step}.deleted"))

    def _open(self, items: tuple[str, ...]) -> None:
        """Starts Orbax for these items; the first time, clears away what a killed run has left."""
        if self._orbax is not None and items == self._items:
            return
        if self._orbax is None:
            for leftover in self.directory.iterdir():
                if re.fullmatch(r"[0-9]+\.(partial.*|deleted)", leftover.name):
                    shutil.rmtree(leftover)
        else:
            self._orbax.close()
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(async_options=options),
            **{item: _arrays_handler() for item in items},
            **{_METADATA: ocp.JsonCheckpointHandler()},
        )
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
        self._items = items

    def _folder(self, step: int) -> Path:
        steps = self.steps()
        if step in steps:
            return self.directory / str(step)
        known = f"Whole steps there: {', '.join(map(str, steps))}." if steps else "There is no whole checkpoint there."
        raise CheckpointError(f"The step must be one that is saved in {self.directory}. Got {step}. {known}")

    def _document(self, step: int) -> dict[str, Any]:
        folder = self._folder(step)
        self._check_bytes(step, [_METADATA])
        document: dict[str, Any] = json.loads((folder / _METADATA / "metadata").read_text())
        return document

    def _check_bytes(self, step: int, items: Sequence[str]) -> None:
        problems = [problem for item in items for problem in differences(self._folder(step), f"{item}/")]
        if problems:
            others = [s for s in self.steps() if s != step and not differences(self.directory / str(s))]
            advice = f"The newest good step is {others[-1]}." if others else "No other step there is good."
            raise CheckpointError(f"Step {step} in {self.directory} is damaged: {'; '.join(problems[:3])}. {advice}")


@dataclass(frozen=True)
class CheckpointInfo:
    """One saved step, for tables."""

    step: int
    bytes: int
    """Of all of its files."""
    saved_at: float
    """Seconds since 1970."""
    metadata: dict[str, Any]
    """What the caller of `save` said of it."""
    leaves: dict[str, dict[str, Any]]
    """For each leaf, `section/path`, its item, shape and dtype."""


def describe_checkpoint(directory: str | Path, step: int) -> CheckpointInfo:
    """What is known of a saved step without reading its arrays. Raises `CheckpointError` when it is not there or
    damaged.
    """
    checkpointer = Checkpointer(directory)
    folder = checkpointer._folder(step)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    saved_at = (folder / CHECKSUMS).stat().st_mtime
    return CheckpointInfo(step, size, saved_at, checkpointer.metadata(step), checkpointer.leaves(step))


def list_checkpoints(directory: str | Path) -> list[int]:
    """Whole steps in a folder, oldest first. Raises `CheckpointError` when there is no such folder, or nothing in it."""
    steps = Checkpointer(directory).steps()
    if not steps:
        raise CheckpointError(
            f"The folder must hold checkpoints. Got {str(directory)!r}, which "
            f"{'has none' if Path(directory).is_dir() else 'is not a folder'}. Name the --checkpoint-dir of a run."
        )
    return steps


def verify_checkpoint(directory: str | Path, step: int) -> list[str]:
    """What is wrong with any byte of a step, one sentence for each file; empty when all is good.

    Raises `CheckpointError` when the step is not there.
    """
    return differences(Checkpointer(directory)._folder(step))


def _index(trees: Sequence[Tree]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, jax.Array]]]:
    """Where each leaf is to be found, and the arrays of each item; a leaf that several stages own is saved by the
    first.
    """
    index: dict[str, dict[str, Any]] = {}
    items: dict[str, dict[str, jax.Array]] = {}
    for stage, tree in enumerate(trees):
        item = f"stage_{stage}"
        for section, leaves in tree.items():
            for path, leaf in leaves.items():
                key = f"{section}/{path}"
                if key in index:
                    continue
                index[key] = {"item": item, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
                if leaf.size:
                    items.setdefault(item, {})[_encode(key)] = leaf
    return index, items


def _check_leaf(step: int, key: str, shape: jax.ShapeDtypeStruct, leaves: Mapping[str, Any]) -> None:
    saved = leaves.get(key)
    if saved is None:
        raise CheckpointError(
            f"Every leaf to restore must be in the checkpoint. {key} is not in step {step}. "
            "The model or optimizer is another than the one that was saved."
        )
    found = (tuple(saved["shape"]), saved["dtype"])
    if found != (tuple(shape.shape), str(shape.dtype)):
        raise CheckpointError(
            f"A leaf must be restored with its saved shape and dtype. {key} is {found[1]}{list(found[0])} in "
            f"step {step}; asked for {shape.dtype}{list(shape.shape)}. Configure the model as it was when it was saved."
        )


def _read(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    empty = {key: jax.device_put(np.zeros(s.shape, s.dtype), s.sharding) for key, s in wanted.items() if not s.size}
    item = {_encode(key): shape for key, shape in wanted.items() if shape.size}
    if not item:
        return empty
    restored = _arrays_handler().restore(
        epath.Path(folder),
        args=ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        ),
    )
    missing = [key for key, leaf in restored.items() if not isinstance(leaf, jax.Array)]
    assert not missing, missing
    return empty | {key: restored[_encode(key)] for key, shape in wanted.items() if shape.size}


def _encode(key: str) -> str:
    """A name without "/" or ".", which Orbax takes for levels of a tree."""
    return key.replace("%", "%25").replace(".", "%2E").replace("/", ".")


def _arrays_handler() -> ocp.PyTreeCheckpointHandler:
    """Uncompressed (random weights shrink by 8 %, for most of the time) and each shard written by its first replica,
    which
    needs no compilation at the first save.
    """
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, array_metadata_store=None)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
