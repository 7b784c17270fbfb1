"""What is in a folder of checkpoints: which steps are whole, what they hold, and their arrays."""

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from meshpipe.checkpoint.checksums import CHECKSUMS, differences
from meshpipe.checkpoint.index import CheckpointError, Tree, check_leaf, is_index, with_sharding
from meshpipe.checkpoint.items import META, directory_name, leaf_of, quiet_orbax, read_arrays, read_document
from meshpipe.checkpoint.shards import files_to_read

FORMAT = 1


class CheckpointReader:
    """Finds and restores the steps of one folder, while a run may be writing to it; changes nothing.

    Raises `CheckpointError` when the folder is none of this machine's file systems.
    """

    def __init__(self, directory: str | Path):
        if "://" in str(directory):
            raise CheckpointError(
                f"Checkpoints are written to folders. Got {str(directory)!r}. Mount the storage, and give its path."
            )
        self.directory = Path(directory).expanduser().absolute()

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
        for stage, tree in enumerate(abstract):
            for key, leaf in _flat(tree):
                check_leaf(step, key, leaf, leaves)
                shape = with_sharding(leaf)
                if shape.sharding.addressable_devices:
                    wanted.setdefault((stage, leaves[key]["item"]), {})[key] = shape
        self._check_bytes(step, _needs(wanted, leaves))
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

    def folder(self, step: int) -> Path:
        """Where a step is. Raises `CheckpointError` when it is not there."""
        steps = self.steps()
        if step in steps:
            return self.directory / str(step)
        known = f"Whole steps there: {', '.join(map(str, steps))}." if steps else "There is no whole checkpoint there."
        raise CheckpointError(f"The step must be one that is saved in {self.directory}. Got {step}. {known}")

    def _document(self, step: int) -> dict[str, Any]:
        """What is written down of a step. It is data from a file: nothing in it is trusted to be a name of a folder."""
        folder = self.folder(step)
        self._check_bytes(step, lambda name: name.startswith(f"{META}/"))
        try:
            document = read_document(folder)
            version, saved_step, leaves = document["format"], document["step"], document["leaves"]
            known = version == FORMAT and isinstance(document["user"], dict)
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
        problems = _problems(self.folder(step), concerns)
        if problems:
            self.folder(step)  # it may have been removed by a run that keeps fewer
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
    checkpointer = CheckpointReader(directory)
    folder = checkpointer.folder(step)
    metadata, leaves = checkpointer.metadata(step), checkpointer.leaves(step)  # and thereby that both are whole
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return CheckpointInfo(step, size, (folder / CHECKSUMS).stat().st_mtime, metadata, leaves)


def list_checkpoints(directory: str | Path) -> list[int]:
    """Saved steps of a folder, oldest first. Raises `CheckpointError` when there is no such folder or no step in it."""
    steps = CheckpointReader(directory).steps()
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
    return _problems(
        CheckpointReader(directory).folder(step), lambda name: zlib.crc32(name.encode()) % readers == reader
    )


def _problems(folder: Path, concerns: Callable[[str], bool] = lambda name: True) -> list[str]:
    """What is wrong with the files of a step, one sentence each, with the leaf of each file."""
    return [
        f"{name} {problem}" + (f" (leaf {leaf})" if (leaf := leaf_of(name)) else "")
        for name, problem in differences(folder, concerns).items()
    ]


def _flat(tree: Tree) -> Iterator[tuple[str, Any]]:
    for section, part in tree.items():
        for path, leaf in part.items():
            yield f"{section}/{path}", leaf


def _needs(
    wanted: Mapping[tuple[int, str], Mapping[str, jax.ShapeDtypeStruct]], leaves: Mapping[str, Any]
) -> Callable[[str], bool]:
    """Whether a file, by its name, belongs to no leaf or has a part of a leaf that is wanted here."""
    needed: dict[str, list[set[str] | None]] = {}
    for (_, item), shapes in wanted.items():
        for key, shape in shapes.items():
            needed.setdefault(f"{item}/{directory_name(key)}", []).append(files_to_read(leaves[key], shape))

    def is_needed(name: str) -> bool:
        folder, _, file = name.rpartition("/")
        return leaf_of(name) is None or any(names is None or file in names for names in needed.get(folder, ()))

    return is_needed
