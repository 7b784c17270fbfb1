"""Saving the trees of all stages of a run, by one process or by several, each step as a whole or not at all."""

import atexit
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from meshpipe.checkpoint.chunks import Region, whole
from meshpipe.checkpoint.contents import Content
from meshpipe.checkpoint.errors import CheckpointError
from meshpipe.checkpoint.files import flush_folder, remove
from meshpipe.checkpoint.index import Index, Tree, index_leaves
from meshpipe.checkpoint.lock import WriterLock
from meshpipe.checkpoint.preparation import check_space, index_shapes, make_writable
from meshpipe.checkpoint.reader import CheckpointReader
from meshpipe.checkpoint.restore import restore_step
from meshpipe.checkpoint.schema import FORMAT
from meshpipe.checkpoint.shards import ReadShard, Shard, all_files, document_files, hold_shards, own_files
from meshpipe.checkpoint.together import SaveTogether, check_together
from meshpipe.documents import dump_json, is_count
from meshpipe.files import remove_empty
from meshpipe.processes.coordination import process_index

_LEFTOVER = re.compile(r"([0-9]{1,16})\.(?:partial.*|deleted)")
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

    Nothing is written, not even the folder, before the first `prepare` or `save`; nothing is removed before it either.
    From then on until `close`, no other process may write to the folder; all may read. `keep` is the number of newest
    steps to keep, 0 for all. The last save is complete only after `wait` or `close`, or at the end of the `with` block.

    A save needs the host's memory for one copy of the shards that this process writes, until they are written; on CPU
    devices the arrays themselves are kept for so long.

    In a run of several processes, each has a checkpointer of the same folder, on a file system that they share, and
    calls `prepare` and `save` for the same steps; each writes its own shards, and the step is there when all are. After
    `wait_seconds` without a word from another process, its part counts as failed.
    Raises `CheckpointError` when the folder is none of this machine's file systems.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3, wait_seconds: float = WAIT_SECONDS):
        super().__init__(directory)
        if keep < 0:
            raise CheckpointError(f"keep must be at least 0. Got {keep}.")
        self._keep, self._wait_seconds = keep, wait_seconds
        self._lock: WriterLock | None = None
        self._made: list[Path] = []
        """The folders that `prepare` made, the innermost first; empty ones are removed when nothing was saved."""
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[int, Future[None]] | None = None
        """The save on its way: its step, and whether it is whole."""
        self._tidying: tuple[int, Future[None]] | None = None
        """The last save and the removal of older steps after it."""

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def prepare(self, shapes: Sequence[Tree], metadata: Mapping[str, Any] | None = None) -> None:
        """Finds out before a run begins what would make its first save fail: makes the folder, takes it for this run,
        and checks paths of leaves, metadata, and room on the disk.

        `shapes` are what `save` will be given, as `jax.ShapeDtypeStruct`s with their shardings. Every process of a run
        calls it. Raises `CheckpointError`, in all of them alike; its subclass `FolderInUseError` when another run
        writes to the folder.
        """

        def check() -> None:
            _dump_metadata(metadata or {})
            index = index_shapes(shapes, self.directory)
            if process_index() == 0:
                self._made += make_writable(self.directory)
                try:
                    self._acquire()
                    self._clear()
                except OSError as error:
                    raise CheckpointError(
                        "Checkpoints need a folder that can be written. "
                        f"Got {self.directory}: {error.strerror or error}. Name another, or change its permissions."
                    ) from error
                check_space(index, self.directory)

        try:
            problems = check_together(check, self._wait_seconds)
            if problems:
                raise CheckpointError("; ".join(problems))
        except CheckpointError:
            self._leave()
            raise

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
        index, items = index_leaves(trees, shapes)
        self._save(step, index, lambda: hold_shards(items), len(trees), metadata)

    def save_as_read(
        self, step: int, shapes: Tree, read: Callable[[str, Region], np.ndarray], metadata: Mapping[str, Any]
    ) -> None:
        """Saves leaves whose values are read while they are written, from a run of one process: there is never more of
        them in memory than what a few files hold.

        `shapes` are `jax.ShapeDtypeStruct`s; `read` gives the values of a part of a leaf, `section/path`. It is called
        in the background, from several threads. Raises as `save` does; what `read` raises is raised by `wait`.
        """
        self.wait()
        index, _ = index_leaves(None, [shapes])

        def shard(key: str, leaf: Mapping[str, Any]) -> Shard:
            return ReadShard(key, whole(leaf["shape"]), np.dtype(leaf["dtype"]).itemsize, partial(read, key))

        self._save(step, index, lambda: [shard(key, leaf) for key, leaf in index.items()], 1, metadata)

    def _save(
        self,
        step: int,
        index: Index,
        hold: Callable[[], list[Shard]],
        stages: int,
        metadata: Mapping[str, Any],
    ) -> None:
        user = _dump_metadata(metadata)
        folder = self.directory / f"{step}.partial"
        together = SaveTogether(folder, self._wait_seconds)
        try:
            together.begin(lambda: self._begin(step))
        except OSError as error:
            raise self._write_error(step, error) from error
        shards = hold()
        head = {"format": FORMAT, "step": step, "stages": stages}
        saved: Future[None] = Future()
        task = self._background.submit(self._write, saved, together, shards, index, head, user, folder)
        self._writing, self._tidying = (step, saved), (step, task)
        atexit.unregister(self._finish_at_exit)
        atexit.register(self._finish_at_exit)

    def restore(self, step: int, abstract: Sequence[Tree]) -> list[dict[str, dict[str, jax.Array]]]:
        """The saved leaves with the shapes, dtypes and shardings of `abstract`, whatever stages and shardings they
        were saved from.

        Leaves of `abstract` are arrays or `jax.ShapeDtypeStruct`s; without a sharding they go to the first device.
        Only files with a part that this process needs are read, in parallel, and each is compared with its checksum
        while it is read. Leaves without a device in this process are not returned. Raises `CheckpointError` when the
        step is not there or damaged, or a leaf is missing or has another shape or dtype.
        """
        return restore_step(self, step, abstract)

    def supersede(self, step: int) -> list[int]:
        """Renames the steps that are newer than this one to `STEP.superseded`, so that its run can be continued; the
        steps that were renamed. In a run of several processes, process 0 does so.
        """
        newer = [other for other in self.steps() if other > step]
        if newer:
            self._acquire()
        for other in reversed(newer):  # what is left after a failure is what was there before a step
            names = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            free = (path for name in names if not (path := self.directory / f"{other}.superseded{name}").exists())
            self.folder(other).rename(next(free))
        return newer

    def wait(self) -> None:
        """Waits until the last save is whole; the files of steps beyond `keep` may still be on their way out.

        Raises `CheckpointWriteError` when it could not be written, or those before could not be removed.
        """
        if self._tidying is not None and self._tidying[1].done():
            self._end_tidying()
        if self._writing is None:
            return
        step, saved = self._writing
        try:
            saved.result()
        except Exception as error:
            raise self._write_error(step, error) from error
        finally:
            self._writing = None
            if self._lock is not None:
                self._lock.end(step)

    def close(self) -> None:
        """Waits for the last save and for what it removes, lets go of the background thread, and leaves the folder to
        other runs. A folder that `prepare` made and that holds nothing is removed.
        """
        try:
            self.wait()
            self._end_tidying()
        finally:
            atexit.unregister(self._finish_at_exit)
            self._background.shutdown()
            self._leave()

    def abandon(self) -> None:
        """Leaves the folder as it was before `prepare`; for a process that ends before its first save, any thread."""
        self._leave()

    def _acquire(self) -> WriterLock:
        """Takes the folder for this process."""
        if self._lock is not None and not self._lock.is_held():
            self._release()
        if self._lock is None:
            self._lock = WriterLock.acquire(self.directory)
        return self._lock

    def _clear(self) -> None:
        """Removes what a dead run, or a save that failed, left half-written in the folder."""
        if self._lock is None or not self._lock.is_held():
            return
        with self._lock.tidying:
            for leftover in self.directory.iterdir():
                found = _LEFTOVER.fullmatch(leftover.name)
                if found and not self._lock.is_writing(int(found[1])):
                    remove(leftover)

    def _release(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _leave(self) -> None:
        """Leaves the folder to other runs, and none behind that was made for nothing."""
        self._release()
        made, self._made = self._made, []
        remove_empty(made)

    def _begin(self, step: int) -> None:
        """Refuses to save a step that is there, is older than one that is, or whose name is taken."""
        if not is_count(step):
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
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self._acquire().begin(step):
            raise CheckpointError(f"Another Checkpointer of this program is writing step {step} to {self.directory}.")

    def _write(
        self,
        saved: Future[None],
        together: SaveTogether,
        shards: list[Shard],
        index: Index,
        head: Mapping[str, Any],
        user: bytes,
        folder: Path,
    ) -> None:
        def own() -> dict[str, Content]:
            files = own_files(shards, index)
            if process_index() == 0:
                document = dump_json({**head, "user": json.loads(user), "leaves": index})
                files |= document_files(document, index)
            return files

        try:
            self._clear()
            together.finish(own, lambda: all_files(index), lambda: self._publish(folder))
        except BaseException as error:
            saved.set_exception(error)
            return
        saved.set_result(None)
        shards.clear()
        self._prune()

    def _publish(self, partial: Path) -> None:
        """Gives a written step its final name."""
        if self._lock is None or not self._lock.is_held():
            raise OSError(f"another run has taken {self.directory} meanwhile")
        partial.rename(partial.with_suffix(""))
        flush_folder(self.directory)

    def _prune(self) -> None:
        """Removes the steps beyond `keep`."""
        if not self._keep or self._lock is None or not self._lock.is_held():
            return
        with self._lock.tidying:
            for step in self.steps()[: -self._keep]:
                # Renamed first, so that no step is listed while it is half deleted.
                deleted = self.directory / f"{step}.deleted"
                remove(deleted)
                remove((self.directory / str(step)).rename(deleted))

    def _end_tidying(self) -> None:
        """Waits until the steps beyond `keep` are removed."""
        tidying, self._tidying = self._tidying, None
        if tidying is None:
            return
        step, task = tidying
        try:
            task.result()
        except OSError as error:
            raise CheckpointWriteError(
                f"Step {step} is saved in {self.directory}, but older ones remain: {error}."
            ) from error

    def _write_error(self, step: int, error: Exception) -> CheckpointWriteError:
        """Clears away what there is of a failed save, which may also be what fills the disk, and says what is left."""
        steps = self.steps()
        if process_index() == 0 and self._lock is not None and self._lock.is_held():
            with suppress(OSError):  # the first error is what counts
                remove(self.directory / f"{step}.partial")
        rest = f"The newest step there is {steps[-1]}." if steps else "No other step is there."
        return CheckpointWriteError(f"Step {step} could not be written to {self.directory}: {error}. {rest}")

    def _finish_at_exit(self) -> None:
        """Python lets threads start no others once the program ends, so a save that nobody waits for can be lost."""
        try:
            self.wait()
        except CheckpointWriteError as error:
            print(f"meshpipe: {error} Call close() on a Checkpointer before the program ends.", file=sys.stderr)
        finally:
            self._release()


def _dump_metadata(metadata: Mapping[str, Any]) -> bytes:
    """The metadata as they are now. Raises `CheckpointError` for what JSON cannot hold."""
    try:
        return dump_json(dict(metadata))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The metadata of a checkpoint must be what JSON can hold. {error}.") from error
