"""What is in a folder of checkpoints: which steps are whole, and what they hold. Imports no JAX."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshpipe.checkpoint.checksums import Checksums, differences, file_problem, load_list, size_differences
from meshpipe.checkpoint.errors import CheckpointError, CheckpointGoneError
from meshpipe.checkpoint.files import below
from meshpipe.checkpoint.names import CHECKSUMS, DOCUMENT, META, leaf_of
from meshpipe.checkpoint.schema import SchemaError, check_document
from meshpipe.documents import LARGEST_DOCUMENT, DamagedFileError, parse_json
from meshpipe.files import expanded


class ProblemsError(Exception):
    """What is wrong with files of a step, by name."""

    def __init__(self, problems: Mapping[str, str]) -> None:
        super().__init__("; ".join(sentences(problems)))
        self.problems = problems


@dataclass(frozen=True)
class SavedStep:
    """A step whose list of files and whose document are as they were written."""

    folder: Path
    files: Checksums
    found: Mapping[str, os.stat_result]
    """What is in the folder."""
    document: dict[str, Any]


class CheckpointReader:
    """Finds and describes the steps of one folder, while a run may be writing to it; changes nothing.

    Raises `CheckpointError` when the folder is none of this machine's file systems.
    """

    def __init__(self, directory: str | Path):
        if "://" in str(directory):
            raise CheckpointError(
                f"Checkpoints are written to folders. Got {str(directory)!r}. Mount the storage, and give its path."
            )
        if "\0" in str(directory):
            raise CheckpointError(f"The name of a folder must have no NUL character. Got {str(directory)!r}.")
        self.directory = expanded("directory", directory).absolute()

    def steps(self) -> list[int]:
        """Steps that were saved as a whole, oldest first; none where there is no folder."""
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"Checkpoints are in a folder. Got {self.directory}: {error.strerror}.") from None
        # Both files are there as soon as a step has its name. One alone shows that the other was lost since, which
        # `verify_checkpoint` tells and which must not pass for a step that never was.
        folders = (self.directory / name for name in names if re.fullmatch("0|[1-9][0-9]{0,15}", name))
        return sorted(
            int(path.name) for path in folders if any(os.path.lexists(path / mark) for mark in (CHECKSUMS, DOCUMENT))
        )

    def latest(self) -> int | None:
        """The newest saved step, or None."""
        return max(self.steps(), default=None)

    def bytes_of(self, step: int) -> int:
        """Bytes of everything that is in the folder of a step, whole or damaged. Raises `CheckpointError` when it is
        not there.
        """
        return sum(status.st_size for status in below(self.folder(step)).values())

    def metadata(self, step: int) -> dict[str, Any]:
        """What the caller of `save` said of the step. Raises `CheckpointError` when it is not there or damaged."""
        return self._document(step)["user"]

    def leaves(self, step: int) -> dict[str, dict[str, Any]]:
        """For each saved leaf, `section/path`, its item, shape and dtype."""
        return self._document(step)["leaves"]

    def fingerprint(self, step: int) -> str:
        """The same for steps whose files are all the same: a digest of the list of their sizes and checksums."""
        with self.reading(step) as folder:
            files = load_step(folder, step).files
        return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()

    def folder(self, step: int) -> Path:
        """Where a step is. Raises `CheckpointGoneError` when it is not there."""
        steps = self.steps()
        if step in steps:
            return self.directory / str(step)
        known = f"Complete steps there: {', '.join(map(str, steps))}." if steps else "None there is complete."
        raise CheckpointGoneError(f"The step must be one that is saved in {self.directory}. Got {step}. {known}")

    def _document(self, step: int) -> dict[str, Any]:
        with self.reading(step) as folder:
            return load_step(folder, step).document

    @contextmanager
    def watching(self, step: int) -> Iterator[Path]:
        """The folder of a step. A `ProblemsError` is left alone unless the step was removed meanwhile, which is no
        damage and raises `CheckpointGoneError`.
        """
        folder = self.folder(step)
        identity = _identity(folder, step)
        try:
            yield folder
        except ProblemsError:
            _check_there(folder, step, identity)
            raise

    @contextmanager
    def reading(self, step: int) -> Iterator[Path]:
        """The folder of a step; what is wrong with it becomes a `CheckpointError` that names the newest good one."""
        try:
            with self.watching(step) as folder:
                yield folder
        except ProblemsError as error:
            found = sentences(error.problems)
            good = newest_good_step(self.directory, but=step)
            advice = "No other step there is good." if good is None else f"The newest good step is {good}."
            raise CheckpointError(
                f"Step {step} in {self.directory} is damaged: {'; '.join(found[:3])}. {advice}"
            ) from None


def load_step(folder: Path, step: int) -> SavedStep:
    """Reads and checks what is written down of a step. It is data from a file: nothing in it is trusted.

    Raises `ProblemsError` for damaged files, and `CheckpointError` where a document with the right checksum is not one
    of this version.
    """
    try:
        files = load_list(folder)
    except FileNotFoundError:
        raise ProblemsError({CHECKSUMS: "is missing"}) from None
    except DamagedFileError as error:
        raise ProblemsError({CHECKSUMS: str(error)}) from None
    found = below(folder)
    problems = differences(folder, found, files, lambda name: name.startswith(f"{META}/") and name != DOCUMENT)
    size = files.get(DOCUMENT, (0, 0))[0]
    text = bytearray(size if size <= LARGEST_DOCUMENT else 0)
    if DOCUMENT not in files:
        problems[DOCUMENT] = f"is not in {CHECKSUMS}"
    elif size > LARGEST_DOCUMENT:
        problems[DOCUMENT] = f"has {size} bytes, more than a document may have"
    elif problem := file_problem(folder, DOCUMENT, files[DOCUMENT], memoryview(text)):
        problems[DOCUMENT] = problem
    if problems:
        raise ProblemsError(problems)
    try:
        document = parse_json(bytes(text))
        check_document(document, files)
    except (DamagedFileError, SchemaError) as error:
        raise CheckpointError(
            f"Step {step} in {folder.parent} is not written as this version of meshpipe writes checkpoints: "
            f"{DOCUMENT}: {error}. Read it with the version that saved it."
        ) from None
    if (held := document["step"]) != step:
        raise CheckpointError(f"{folder} holds step {held}. Name the folder {held} again.")
    return SavedStep(folder, files, found, document)


def newest_good_step(directory: Path, but: int) -> int | None:
    """The newest step, other than one, of which every byte is good."""
    for step in reversed(CheckpointReader(directory).steps()):
        with suppress(CheckpointGoneError):
            if step != but and not step_problems(directory / str(step), step):
                return step
    return None


def step_problems(folder: Path, step: int, concerns: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with the files of a step, one sentence each. Raises `CheckpointGoneError` when it was removed
    meanwhile.
    """
    return _problems(folder, step, lambda saved: differences(folder, saved.found, saved.files, concerns))


def outline_problems(folder: Path, step: int) -> list[str]:
    """What `step_problems` finds without reading the files of leaves: by their names and sizes."""
    return _problems(folder, step, lambda saved: size_differences(saved.found, saved.files))


def _problems(folder: Path, step: int, compare: Callable[[SavedStep], Mapping[str, str]]) -> list[str]:
    identity = _identity(folder, step)
    try:
        found = sentences(compare(load_step(folder, step)))
    except ProblemsError as error:
        found = sentences(error.problems)
    except CheckpointError as error:
        found = [str(error)]
    if found:
        _check_there(folder, step, identity)
    return found


def sentences(problems: Mapping[str, str]) -> list[str]:
    """What is wrong with each file, with its leaf."""
    return [
        f"{_printable(name)} {problem}" + (f" (leaf {_printable(leaf)})" if (leaf := leaf_of(name)) else "")
        for name, problem in sorted(problems.items())
    ]


def _identity(folder: Path, step: int) -> tuple[int, int]:
    """What stays the same as long as a step is there: a step is renamed before anything of it is removed."""
    try:
        status = folder.stat()
    except OSError:
        raise CheckpointGoneError(
            f"Step {step} was removed from {folder.parent} while it was read, as a run does with steps beyond those it "
            "keeps. Take a newer one."
        ) from None
    return status.st_dev, status.st_ino


def _check_there(folder: Path, step: int, before: tuple[int, int]) -> None:
    """Raises `CheckpointGoneError` when a step is not what it was."""
    if _identity(folder, step) != before:
        raise CheckpointGoneError(f"Step {step} of {folder.parent} was replaced while it was read. Read it again.")


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)
