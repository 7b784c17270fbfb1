"""One save by all processes of a run: each writes its own files, and process 0 makes the step of them."""

import itertools
import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path

from meshpipe.checkpoint.checksums import check_sizes, write_files, write_list
from meshpipe.processes.coordination import ask, delete, process_count, process_index, tell

_numbers = itertools.count()
_last_topic: dict[Path, str] = {}
"""By folder, the topic of the last save there, which nobody reads once all have written their part of the next."""


class SaveTogether:
    """What the processes tell each other about one save; every process makes one for each save, in the same order.

    `seconds` is how long to wait for another process, beyond what the own part takes.
    """

    def __init__(self, partial: Path, seconds: float):
        self._partial, self._seconds = partial, seconds
        self._topic = f"meshpipe/checkpoint/{next(_numbers)}"

    def begin(self, prepare: Callable[[], None]) -> None:
        """Process 0 makes the folder, while the others go on. Raises there what `prepare` raises."""
        if process_index() > 0:
            return
        try:
            prepare()
            self._partial.mkdir()
        except Exception as error:
            self._tell("begun", _problem(error))
            raise
        self._tell("begun", "")

    def finish(self, own: Mapping[str, bytes | memoryview], leaves: Set[str], commit: Callable[[], None]) -> None:
        """Writes the files of this process, and returns when the step is there, with the files of all processes.

        `leaves` are the names of all files that leaves must have; `commit` gives the folder its name, in process 0.
        Raises `OSError` in every process when one has failed or keeps the others waiting, and says which.
        """
        me = process_index()
        problem = self._hear("begun", of=0) if me else ""
        if problem:  # process 0 asks for no parts
            raise OSError(problem)
        problem = self._attempt(lambda: self._write(own))
        self._tell(f"part/{me}", problem)
        if me:
            whole = self._hear("whole", of=0, seconds=2 * self._seconds)
        else:
            # All are heard, so that none still writes when what there is gets cleared away.
            told = [self._hear(f"part/{process}", of=process) for process in range(process_count())]
            if (read := _last_topic.get(self._partial.parent)) is not None:
                delete(read)
            _last_topic[self._partial.parent] = self._topic
            whole = "; ".join(filter(None, told)) or self._attempt(lambda: self._complete(leaves, commit))
            self._tell("whole", whole)
        if whole:
            raise OSError(whole)

    def _write(self, own: Mapping[str, bytes | memoryview]) -> None:
        checksums = write_files(self._partial, own)
        write_files(self._partial, {self._part(process_index()): json.dumps(checksums).encode()})

    def _complete(self, leaves: Set[str], commit: Callable[[], None]) -> None:
        files: dict[str, list[int]] = {}
        for process in range(process_count()):
            part = self._partial / self._part(process)
            try:
                files |= json.loads(part.read_text())
            except FileNotFoundError as error:
                raise OSError(
                    f"what process {process} wrote is not in the {self._partial.parent} of process 0. "
                    "Save into a folder of a file system that all processes share"
                ) from error
            part.unlink()
        missing = sorted(leaves - files.keys())
        if missing:
            raise OSError(f"no process has written {missing[0]}, and {len(missing) - 1} other files")
        check_sizes(self._partial, files)
        write_list(self._partial, files)
        commit()

    def _part(self, process: int) -> str:
        return f"part_{process}.json"

    def _tell(self, what: str, problem: str) -> None:
        tell(f"{self._topic}/{what}", problem)

    def _hear(self, what: str, *, of: int, seconds: float | None = None) -> str:
        seconds = self._seconds if seconds is None else seconds
        try:
            return ask(f"{self._topic}/{what}", seconds)
        except TimeoutError:
            return f"process {of} was not heard of for {seconds:.0f} s"

    def _attempt(self, action: Callable[[], None]) -> str:
        try:
            action()
        except Exception as error:
            return _problem(error)
        return ""


def _problem(error: Exception) -> str:
    return f"process {process_index()}: {error or type(error).__name__}"
