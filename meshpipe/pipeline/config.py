"""How one step is cut into stages and microbatches."""

import re
from dataclasses import dataclass

CHECKPOINT_POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)
"""The members of `jax.checkpoint_policies` that need no arguments."""
REMAT_POLICIES = ("none", "full", *CHECKPOINT_POLICIES)


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Schedule, microbatches, rematerialisation and stage boundaries of one step."""

    schedule: str = "1f1b"
    """The order in which each rank does its forwards and backwards: the name of a schedule, or the file of a plan
    (ending in .txt)."""
    stages_per_rank: int | None = None
    """Stages that each pipeline rank holds; None is the fewest that the schedule takes."""
    num_microbatches: int = 1
    """Equal slices of the batch that flow through the pipeline; gradients accumulate over them."""
    remat: str = "none"
    """`none` keeps what backward needs; `full` keeps only stage inputs and computes forward again; the name of a
    `jax.checkpoint_policies` member, e.g. `dots_saveable`, keeps what that policy saves."""
    memory_limit: str | None = None
    """Bytes that each device may hold, e.g. `12GiB`, `800MB` or `1500000`, for `--remat auto` to fit into."""
    boundaries: tuple[int, ...] | None = None
    """First layer of every stage after the first, e.g. `2 4` for layers 0-1, 2-3 and 4-; None cuts evenly."""

    def __post_init__(self) -> None:
        for name in ("stages_per_rank", "num_microbatches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1. Got {value}.")
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"--remat must be one of {', '.join(REMAT_POLICIES)}. Got {self.remat!r}.")


UNITS = {prefix + "B": 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T"))} | {
    prefix + "iB": 1024**power for power, prefix in enumerate(("", "K", "M", "G", "T")) if prefix
}


def parse_bytes(text: str) -> int:
    """The number of bytes that a text such as `12GiB`, `1.5 GB` or `800000` stands for.

    Units are those of 1000 (kB, MB, GB, TB) and of 1024 (KiB, MiB, GiB, TiB), in upper or lower case. Raises
    `ValueError` for any other text, and for less than one byte.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()} | {"": 1}
    if match is None or match[2].lower() not in units or (count := int(float(match[1]) * units[match[2].lower()])) < 1:
        raise ValueError(
            f"A memory limit must be a number of bytes above 0, alone or with one of the units {', '.join(UNITS)}, "
            f"e.g. 12GiB. Got {text!r}."
        )
    return count
