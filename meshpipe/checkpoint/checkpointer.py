"""Saving the trees of all stages of a run, by one process or by several, each step as a whole or not at all."""

import atexit
import itertools
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp

from meshpipe.checkpoint.checksums import flush_folder, write_checksums
from meshpipe.checkpoint.index import CheckpointError, Tree, index_leaves
from meshpipe.checkpoint.items import open_orbax, quiet_orbax, start_save
from meshpipe.checkpoint.reader import FORMAT, CheckpointReader
from meshpipe.checkpoint.shards import all_files, document_files, own_files
from meshpipe.checkpoint.together import SaveTogether
from meshpipe.processes.coordination import process_count, process_index

_LEFTOVER = re.compile(r"[0-9]+\.(partial.*|deleted)")
WAIT_SECONDS = 1800.0
"""How long processes wait for each other in a save."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


class Checkpointer(CheckpointReader):
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
        super().__init__(directory)
        if keep < 0:
            raise CheckpointError(f"keep must be at least 0. Got {keep}.")
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
        document = {"format": FORMAT, "step": step, "user": dict(metadata), "leaves": leaves, "stages": len(trees)}
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

    def supersede(self, step: int) -> list[int]:
        """Renames the steps that are newer than this one to `STEP.superseded`, so that its run can be gone on with; the
        steps that were renamed. In a run of several processes, process 0 does so.
        """
        newer = [other for other in self.steps() if other > step]
        for other in reversed(newer):  # what is left after a failure is what was there before a step
            names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            free = (path for name in names if not (path := self.directory / f"{other}.superseded{name}").exists())
            self.folder(other).rename(next(free))
        return newer

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
