"""One save by all processes of a run: each writes its own files, and process 0 makes the step of them."""

import itertools
import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path

from meshpipe.checkpoint.checksums import Checksums, is_list, size_differences, write_list
from meshpipe.checkpoint.contents import Content, write_files
from meshpipe.checkpoint.files import below, remove
from meshpipe.documents import LARGEST_DOCUMENT, DamagedFileError, load_json
from meshpipe.processes.coordination import all_gather, delete_key, process_count, process_index, set_key, wait_for_key
from meshpipe.processes.printable import printable

_numbers = itertools.count()
_last_topic: dict[Path, str] = {}
"""By folder, the topic of the last save there, which nobody reads once all have written their part of the next."""


class SaveTogether:
    """What the processes report to each other about one save; every process makes one for each save, in the same order.

    A run of one process has nobody to report to. `seconds` is how long to wait for another process, beyond what the own
    part takes.
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
            remove(self._partial)
            self._partial.mkdir()
        except Exception as error:
            self._report("begun", problem_of(error))
            raise
        self._report("begun", "")

    def finish(
        self,
        own: Callable[[], Mapping[str, Content]],
        all_names: Callable[[], Set[str]],
        commit: Callable[[], None],
    ) -> None:
        """Writes the files of this process, and returns when the step is there, with the files of all processes.

        `own` gives the files, `all_names` the names of all files that leaves must have; `commit` gives the folder its
        name, in process 0. Raises `OSError` in every process when one has failed or keeps the others waiting, and says
        which.
        """
        me = process_index()
        problem = self._wait_for("begun", of=0) if me else ""
        if problem:  # process 0 asks for no parts
            raise OSError(problem)
        written: dict[str, tuple[int, int]] = {}
        problem = self._attempt(lambda: written.update(self._write(own())))
        if me:
            self._report(f"part/{me}", problem)
            whole = self._wait_for("whole", of=0, seconds=2 * self._seconds)
            if process_count() > 1:
                delete_key(f"{self._topic}/part/{me}")  # process 0 has read it
        else:
            # All must report, so that none still writes when what there is gets cleared away.
            reports = [self._wait_for(f"part/{process}", of=process) for process in range(1, process_count())]
            self._forget_the_last()
            whole = "; ".join(filter(None, (problem, *reports)))
            whole = whole or self._attempt(lambda: self._complete(written, all_names(), commit))
            self._report("whole", whole)
        if whole:
            raise OSError(whole)

    def _write(self, own: Mapping[str, Content]) -> Checksums:
        """Writes files through to the disk; the checksums of what was to be written. Process 0 finds those of
        the others in files.
        """
        written = write_files(self._partial, own)
        if process_index():
            write_files(self._partial, {_part(process_index()): Content(json.dumps(written).encode())})
        return written

    def _complete(self, own: Checksums, all_names: Set[str], commit: Callable[[], None]) -> None:
        files = dict(own)
        for process in range(1, process_count()):
            files |= self._read_part(process)
        missing = sorted(all_names - files.keys())
        if missing:
            raise OSError(f"no process has written {missing[0]}, and {len(missing) - 1} other files")
        wrong = size_differences(below(self._partial), files)
        if wrong:
            name = min(wrong)
            raise OSError(f"{name} {wrong[name]}, and {len(wrong) - 1} other files are not as they were written")
        write_list(self._partial, files)
        commit()

    def _read_part(self, process: int) -> Checksums:
        part = self._partial / _part(process)
        try:
            found = load_json(part, LARGEST_DOCUMENT)
            if not is_list(found):
                raise DamagedFileError("is no list of sizes and checksums")
        except FileNotFoundError as error:
            raise OSError(
                f"what process {process} wrote is not in the {self._partial.parent} of process 0. "
                "Save into a folder of a file system that all processes share"
            ) from error
        except DamagedFileError as error:
            raise OSError(f"{part.name} {error}") from error
        part.unlink()
        return {name: (size, crc) for name, (size, crc) in found.items()}

    def _forget_the_last(self) -> None:
        if process_count() > 1:
            if (read := _last_topic.get(self._partial.parent)) is not None:
                delete_key(read)
            _last_topic[self._partial.parent] = self._topic

    def _report(self, what: str, problem: str) -> None:
        if process_count() > 1:
            set_key(f"{self._topic}/{what}", problem)

    def _wait_for(self, what: str, *, of: int, seconds: float | None = None) -> str:
        seconds = self._seconds if seconds is None else seconds
        try:
            return printable(wait_for_key(f"{self._topic}/{what}", seconds))
        except TimeoutError:
            return f"process {of} did not report for {seconds:.0f} s"

    def _attempt(self, action: Callable[[], None]) -> str:
        try:
            action()
        except Exception as error:
            return problem_of(error)
        return ""


def check_together(check: Callable[[], None], seconds: float) -> list[str]:
    """Runs a check in every process of a run; the problems of all. Every process has to call it, in the same order.

    A run of one process raises what the check raises.
    """
    if process_count() == 1:
        check()
        return []
    try:
        check()
        problem = ""
    except (OSError, ValueError) as error:
        problem = str(error) or type(error).__name__
    told = all_gather(f"meshpipe/checkpoint/{next(_numbers)}/check", problem, seconds)
    return [text for text in dict.fromkeys(told) if text]


def problem_of(error: Exception) -> str:
    """What went wrong in this process, for all."""
    text = str(error) or type(error).__name__
    return text if process_count() == 1 else f"process {process_index()}: {text}"


def _part(process: int) -> str:
    return f"part_{process}.json"
