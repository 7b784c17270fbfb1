"""How one step is cut into stages and microbatches."""

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
    boundaries: tuple[int, ...] | None = None
    """First layer of every stage after the first, e.g. `2 4` for layers 0-1, 2-3 and 4-; None cuts evenly."""

    def __post_init__(self) -> None:
        for name in ("stages_per_rank", "num_microbatches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1. Got {value}.")
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"--remat must be one of {', '.join(REMAT_POLICIES)}. Got {self.remat!r}.")
