"""What a checkpoint without the parameters that are not trained says of them, its base. Imports no JAX."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meshpipe.checkpoint.errors import CheckpointError
from meshpipe.documents import is_count

BASE = "frozen_base"
"""The entry of a step's metadata."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """The parameters that a checkpoint leaves out: which they are, and where its run had them from."""

    digest: str
    """Of their paths, shapes, dtypes and values."""
    folder: str | None = None
    """Folder that they came from; None where they are first values, drawn from the seed."""
    step: int | None = None
    """The step, where it is a folder of checkpoints; None where it is one of published weights."""
    seed: int | None = None
    """Seed of the first values."""

    def values(self) -> dict[str, Any]:
        """For the metadata of a step."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        if self.folder is None:
            where = f"the first values of seed {self.seed}"
        else:
            where = f"the weights of {self.folder}" if self.step is None else f"step {self.step} of {self.folder}"
        return f"base {self.digest[:12]}, {where}"


def base_of(metadata: Mapping[str, Any]) -> Base | None:
    """What the metadata of a step, which are untrusted input, say of its base; None where the step is complete.

    Raises `CheckpointError` for what no run writes.
    """
    found = metadata.get(BASE)
    if found is None:
        return None
    if not isinstance(found, dict) or not found.keys() <= {"digest", "folder", "step", "seed"} or not _is_base(found):
        raise CheckpointError(
            f"The metadata of a checkpoint must describe its base as a run does. Got {found!r:.100}. Name another step."
        )
    return Base(**found)


def _is_base(found: Mapping[str, Any]) -> bool:
    digest, folder = found.get("digest"), found.get("folder")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{32}", digest):
        return False
    if folder is None:
        return "step" not in found and is_count(found.get("seed"), 2**32)
    return isinstance(folder, str) and ("step" not in found or is_count(found["step"])) and "seed" not in found
