"""Checkpoints on Orbax: an item per stage, leaves keyed by path, a step listed only once it is whole."""

import atexit
import itertools
import json
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from meshpipe.checkpoint_index import CheckpointError as CheckpointError
from meshpipe.checkpoint_index import Tree, check_leaf, index_leaves, is_index, with_sharding
from meshpipe.checkpoint_items import (
    META,
    directory_name,
    leaf_of,
    open_orbax,
    quiet_orbax,
    read_arrays,
    read_document,
    start_save,
)
from meshpipe.checkpoint_shards import all_files, document_files, files_to_read, own_files
from meshpipe.checkpoint_together import SaveTogether
from meshpipe.checksums import CHECKSUMS, differences, flush_folder, write_checksums
from meshpipe.coordination import process_count, process_index

_FORMAT = 1
_LEFTOVER = re.compile(r"[0-9]+\.(partial.*|deleted)")
WAIT_SECONDS = 1800.0
"""How long processes wait for each other in a save."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where and how often a run saves, and whether it goes on from what was saved."""

    checkpoint_dir: str | None = None
    """Folder of the checkpoints, made when missing; None saves nothing."""
    checkpoint_every: int = 0
    """Updates between saves; 0 saves only at the end. A run that completes or is stopped is always saved at its end."""
    checkpoint_keep: int = 3
    """Newest checkpoints kept; older ones are removed after a save. 0 keeps all."""
    resume: bool = False
    """Go on from the newest checkpoint of the folder; an error when there is none."""
    resume_from: int | None = None
    """Go on from this checkpoint of the folder. Newer ones are renamed to STEP.superseded once it is restored."""
    auto_resume: bool = False
    """Go on from the newest checkpoint of the folder if there is one, else start from the beginning."""

    @property
    def may_continue(self) -> bool:
        """Whether the run may be the continuation of another, to whose files it appends."""
        return self.resume or self.auto_resume or self.resume_from is not None

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "checkpoint_keep"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0. Got {getattr(self, name)}.")
        if self.checkpoint_dir is None:
            flags = {
                "--resume": self.resume,
                "--resume-from": self.resume_from is not None,
                "--auto-resume": self.auto_resume,
                "--checkpoint-every": self.checkpoint_every > 0,
            }
            for name, asked in flags.items():
                if asked:
                    raise ValueError(f"{name} needs a folder of checkpoints. Got none: add --checkpoint-dir DIR.")
        elif not self.checkpoint_dir.strip():
            raise ValueError("--checkpoint-dir must name a folder. Got an empty name.")
        if self.resume_from is not None and (self.resume or self.auto_resume):
            other = "--resume" if self.resume else "--auto-resume"
            raise ValueError(
                f"--resume-from names a checkpoint, and {other} takes the newest. Got both. Leave one of them out."
            )


class Checkpointer:
    """Saves and restores the trees of all stages of a run in one folder.

    A step is written under a temporary name and gets its own when all of its files and their checksums are there.
    Without a trainer, `params` being a dict of arrays::

        with Checkpointer("runs/mine") as checkpointer:
            checkpointer.save(step, [{"params": params}], {"seed": 0})

        checkpointer = Checkpointer("runs/mine")
        [tree] = checkpointer.restore(checkpointer.latest(), [{"params": params_or_their_shapes}])

    Nothing is written, not even the folder, before the first `save`; nothing is removed before it either. One
    checkpointer at a time may write to a folder; others may read. `keep` is the number of newest steps to keep, 0 for
    all. The last save is complete only after `wait` or `close`, or at the end of the `with` block.

    Of a run of several processes, each has a checkpointer of the same folder, on a file system that they share, and
    calls `save` for the same steps; each writes its own shards, and the step is there when all are. After
    `wait_seconds` without a word from another process, its part counts as failed.
    Raises `CheckpointError` when the folder is none of this machine's file systems.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3, wait_seconds: float = WAIT_SECONDS):
        if "://" in str(directory):
            raise CheckpointError(
                f"Checkpoints are written to folders. Got {str(directory)!r}. Mount the storage, and give its path."
            )
        if keep < 0:
            raise CheckpointError(f"keep must be at least 0. Got {keep}.")
        self.directory = Path(directory).absolute()
        self._keep, self._wait_seconds = keep, wait_seconds
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._items: tuple[str, ...] = ()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(
        self,
        step: int,
        trees: Sequence[Tree],
        metadata: Mapping[str, Any],
        shapes: Sequence[Tree] | None = None,
    ) -> None:
        """Takes hold of the arrays, then writes them in the background; they may be donated as soon as this returns.

        `metadata` is anything JSON can hold. `shapes`, which only a run of several processes needs, are the trees of
        all stages as `jax.ShapeDtypeStruct`s with their shardings; leaves without a device in this process are not in
        `trees`. Waits for the save before. Raises `CheckpointError` when the step is not newer than all that are there,
        or something is given that cannot be saved; `CheckpointWriteError` when the save before this one could not be
        written.
        """
        self.wait()
        leaves, items = index_leaves(trees, shapes)
        document = {"format": _FORMAT, "step": step, "user": dict(metadata), "leaves": leaves, "stages": len(trees)}
        try:
            json.dumps(document)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"The metadata of a checkpoint must be what JSON can hold. {error}.") from error
        if process_count() == 1:
            self._save_alone(step, items, document)
        else:
            self._save_together(step, items, document)
        atexit.unregister(self._warn_at_exit)
        atexit.register(self._warn_at_exit)

    def _save_alone(self, step: int, items: Mapping[str, Any], document: Mapping[str, Any]) -> None:
        self._check_newer(step)
        partial = self.directory / f"{step}.partial"
        with ExitStack() as quiet:
            quiet.enter_context(quiet_orbax())
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                orbax = self._open(tuple(items))
                start_save(orbax, partial, items, document)
            except OSError as error:
                raise self._write_error(step, error) from error
            self._writing = step, self._background.submit(self._commit, orbax, partial, quiet.pop_all())

    def _save_together(self, step: int, items: Mapping[str, Any], document: Mapping[str, Any]) -> None:
        partial = self.directory / f"{step}.partial"
        together = SaveTogether(partial, self._wait_seconds)

        def prepare() -> None:
            self._check_newer(step)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear()

        try:
            together.begin(prepare)
        except OSError as error:
            raise self._write_error(step, error) from error
        files = own_files(items)
        if process_index() == 0:
            files |= document_files(document)
        leaves = all_files(document["leaves"])
        writing = self._background.submit(together.finish, files, leaves, lambda: self._publish(partial))
        self._writing = step, writing

    def restore(self, step: int, abstract: Sequence[Tree]) -> list[dict[str, dict[str, jax.Array]]]:
        """The saved leaves with the shapes, dtypes and shardings of `abstract`, whatever stages and shardings they
        were saved from.

        Leaves of `abstract` are arrays or `jax.ShapeDtypeStruct`s; without a sharding they go to the first device.
        Only files with shards that this process needs are read, after they were compared with their checksums. Leaves
        without a device in this process are not returned. Raises `CheckpointError` when the step is not there or
        damaged, or a leaf is missing or has another shape or dtype.
        """
        leaves = self._document(step)["leaves"]
        wanted: dict[tuple[int, str], dict[str, jax.ShapeDtypeStruct]] = {}
        needed: dict[str, list[set[str] | None]] = {}
        for stage, tree in enumerate(abstract):
            for section, part in tree.items():
                for path, leaf in part.items():
                    key = f"{section}/{path}"
                    check_leaf(step, key, leaf, leaves)
                    shape, item = with_sharding(leaf), leaves[key]["item"]
                    if shape.sharding.addressable_devices:
                        wanted.setdefault((stage, item), {})[key] = shape
                        needed.setdefault(f"{item}/{directory_name(key)}", []).append(files_to_read(leaves[key], shape))

        def is_needed(name: str) -> bool:
            folder, _, file = name.rpartition("/")
            return leaf_of(name) is None or any(names is None or file in names for names in needed.get(folder, ()))

        self._check_bytes(step, is_needed)
        found: list[dict[str, jax.Array]] = [{} for _ in abstract]
        with quiet_orbax():
            for (stage, item), shapes in wanted.items():
                found[stage].update(read_arrays(self.directory / str(step) / item, shapes))
        return [
            {
                section: {path: arrays[key] for path in part if (key := f"{section}/{path}") in arrays}
                for section, part in tree.items()
            }
            for arrays, tree in zip(found, abstract, strict=True)
        ]

    def supersede(self, step: int) -> list[int]:
        """Renames the steps that are newer than this one to `STEP.superseded`, so that its run can be gone on with; the
        steps that were renamed. In a run of several processes, process 0 does so.
        """
        newer = [other for other in self.steps() if other > step]
        for other in reversed(newer):  # what is left after a failure is what was there before a step
            names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            free = (path for name in names if not (path := self.directory / f"{other}.superseded{name}").exists())
            self._folder(other).rename(next(free))
        return newer

    def steps(self) -> list[int]:
        """Steps that were saved as a whole, oldest first; none where there is no folder."""
        if not self.directory.is_dir():
            return []
        # Both files are there as soon as a step has its name. One alone shows that the other was lost since, which
        # `verify_checkpoint` tells and which must not pass for a step that never was.
        marks = (CHECKSUMS, f"{META}/metadata")
        folders = (path for path in self.directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", path.name))
        return sorted(int(path.name) for path in folders if any((path / mark).is_file() for mark in marks))

    def latest(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.steps(), default=None)

    def metadata(self, step: int) -> dict[str, Any]:
        """What the caller of `save` said of the step. Raises `CheckpointError` when it is not there or damaged."""
        return self._document(step)["user"]

    def leaves(self, step: int) -> dict[str, dict[str, Any]]:
        """For each saved leaf, `section/path`, its item, shape and dtype."""
        return self._document(step)["leaves"]

    def wait(self) -> None:
        """Waits until the last save is whole. Raises `CheckpointWriteError` when it could not be written."""
        if self._writing is None:
            return
        step, writing = self._writing
        try:
            writing.result()
        except Exception as error:
            self._writing = None
            raise self._write_error(step, error) from error
        self._writing = None

    def close(self) -> None:
        """Waits for the last save and lets go of the background threads."""
        try:
            self.wait()
        finally:
            atexit.unregister(self._warn_at_exit)
            self._background.shutdown()
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def _check_newer(self, step: int) -> None:
        """Refuses to save a step that is there, is older than one that is, or whose name is taken."""
        if step < 0:
            raise CheckpointError(f"A step must be at least 0. Got {step}.")
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"Checkpoints are saved in a folder. Got {self.directory}, a file. Name another.")
        newest = self.latest()
        if newest is not None and step <= newest:
            raise CheckpointError(
                f"A checkpoint must be newer than those in the folder. Got step {step}, with step {newest} in "
                f"{self.directory}. Save into another folder, or resume from the newest."
            )
        path = self.directory / str(step)
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise CheckpointError(f"{path} is in the way of a checkpoint and is none. Move it, or name another folder.")

    def _commit(self, orbax: ocp.AsyncCheckpointer, partial: Path, quiet: ExitStack) -> None:
        with quiet:
            orbax.wait_until_finished()
        write_checksums(partial)
        self._publish(partial)

    def _publish(self, partial: Path) -> None:
        """Gives a written step its final name, then removes the steps beyond `keep`."""
        partial.rename(partial.with_suffix(""))
        flush_folder(self.directory)
        for step in self.steps()[: -self._keep] if self._keep else ():
            # Renamed first, so that no step is listed while it is half deleted.
            shutil.rmtree((self.directory / str(step)).rename(self.directory / f"{step}.deleted"))

    def _write_error(self, step: int, error: Exception) -> CheckpointWriteError:
        """Clears away what there is of a failed save, which may also be what fills the disk, and says what is left."""
        steps = self.steps()
        if step in steps:
            return CheckpointWriteError(f"Step {step} is saved in {self.directory}, but older ones remain: {error}.")
        if process_index() == 0:
            for leftover in self.directory.glob(f"{step}.partial*"):
                shutil.rmtree(leftover, ignore_errors=True)
        rest = f"The newest step there is {steps[-1]}." if steps else "No other step is there."
        return CheckpointWriteError(f"Step {step} could not be written to {self.directory}: {error}. {rest}")

    def _warn_at_exit(self) -> None:
        """Python lets threads start no others once the program ends, so a save that nobody waits for can be lost."""
        try:
            self.wait()
        except CheckpointWriteError as error:
            print(f"meshpipe: {error} Call close() on a Checkpointer before the program ends.", file=sys.stderr)

    def _open(self, items: tuple[str, ...]) -> ocp.AsyncCheckpointer:
        """Orbax for these items; the first time, clears away what a killed run has left."""
        if self._orbax is not None and items == self._items:
            return self._orbax
        if self._orbax is None:
            self._clear()
        else:
            self._orbax.close()
        self._orbax, self._items = open_orbax(items), items
        return self._orbax

    def _clear(self) -> None:
        for leftover in self.directory.iterdir():
            if _LEFTOVER.fullmatch(leftover.name):
                shutil.rmtree(leftover)

    def _folder(self, step: int) -> Path:
        steps = self.steps()
        if step in steps:
            return self.directory / str(step)
        known = f"Whole steps there: {', '.join(map(str, steps))}." if steps else "There is no whole checkpoint there."
        raise CheckpointError(f"The step must be one that is saved in {self.directory}. Got {step}. {known}")

    def _document(self, step: int) -> dict[str, Any]:
        """What is written down of a step. It is data from a file: nothing in it is trusted to be a name of a folder."""
        folder = self._folder(step)
        self._check_bytes(step, lambda name: name.startswith(f"{META}/"))
        try:
            document = read_document(folder)
            version, saved_step, leaves = document["format"], document["step"], document["leaves"]
            known = version == _FORMAT and isinstance(document["user"], dict)
            known = known and is_index(leaves)
        except (ValueError, KeyError, TypeError, AttributeError):
            known = False
        if not known:
            raise CheckpointError(
                f"Step {step} in {self.directory} is not written as this version of meshpipe writes checkpoints. "
                "Read it with the version that saved it."
            )
        if saved_step != step:
            raise CheckpointError(f"{folder} holds step {saved_step}. Name the folder {saved_step} again.")
        return document

    def _check_bytes(self, step: int, concerns: Callable[[str], bool]) -> None:
        problems = _problems(self._folder(step), concerns)
        if problems:
            self._folder(step)  # it may have been removed by a run that keeps fewer
            others = (other for other in reversed(self.steps()) if other != step)
            good = next((other for other in others if not differences(self.directory / str(other))), None)
            advice = "No other step there is good." if good is None else f"The newest good step is {good}."
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
    metadata, leaves = checkpointer.metadata(step), checkpointer.leaves(step)  # and thereby that both are whole
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return CheckpointInfo(step, size, (folder / CHECKSUMS).stat().st_mtime, metadata, leaves)


def list_checkpoints(directory: str | Path) -> list[int]:
    """Saved steps of a folder, oldest first. Raises `CheckpointError` when there is no such folder or no step in it."""
    steps = Checkpointer(directory).steps()
    if not steps:
        raise CheckpointError(
            f"The folder must hold checkpoints. Got {str(directory)!r}, which "
            f"{'has none' if Path(directory).is_dir() else 'is not a folder'}. Name the --checkpoint-dir of a run."
        )
    return steps


def verify_checkpoint(directory: str | Path, step: int, *, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with any byte of a step, one sentence for each file; empty when all is good.

    With a `share` of `(i, n)` only the files of reader `i` of `n`, who together read all. Raises `CheckpointError` when
    the step is not there.
    """
    reader, readers = share
    return _problems(Checkpointer(directory)._folder(step), lambda name: zlib.crc32(name.encode()) % readers == reader)


def _problems(folder: Path, concerns: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with the files of a step, one sentence each, with the leaf of each file."""
    return [
        f"{name} {problem}" + (f" (leaf {leaf})" if (leaf := leaf_of(name)) else "")
        for name, problem in differences(folder, concerns).items()
    ]
