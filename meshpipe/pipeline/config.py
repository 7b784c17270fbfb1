"""How a step is cut into stages and microbatches, and in which order these run."""

import re
from dataclasses import dataclass

from meshpipe.errors import ArgumentError, check_whole, kind_of
from meshpipe.files import expand_fields
from meshpipe.pipeline.remat import check_remat

SIZE_LIMIT = 2**16 + 1
"""Upper limit for microbatches and for stages per rank: a plan has an action for each microbatch in each stage."""
PARTITIONS = ("even", "cost", "measured")
"""The named ways to cut layers into stages."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Schedule, microbatches, rematerialisation, and how layers are cut into stages."""

    schedule: str = "1f1b"
    """The order in which each rank runs its forwards and backwards: `gpipe`, `1f1b`, `eager-1f1b`, `interleaved-1f1b`,
    `looped-bfs`, `zb-h1`, `zb-h2`, `zb-v` or `dualpipe-v`; the path of a plan file that ends in .txt; or `auto`, the
    fastest plan found for the costs of the stages within the memory limit."""
    stages_per_rank: int | None = None
    """Number of stages that each pipeline rank holds. None takes the fewest that the schedule allows; with `--schedule
    auto`, the best number found."""
    num_microbatches: int = 1
    """Number of equal slices of the batch that flow through the pipeline; gradients accumulate over them. The batch
    size must divide by it times the data axis. More of them mean less idle time and smaller matrix products."""
    remat: str = "none"
    """What forward stores for backward. `none` stores all residuals; `layer` the input of every layer, and recomputes
    the layers one at a time; `full` only the inputs of stages, and recomputes the whole stage before its backward. A
    policy of `jax.checkpoint_policies` stores what it saves: `everything_saveable`, `nothing_saveable`, `dots_saveable`
    (also `checkpoint_dots`) or `dots_with_no_batch_dims_saveable` (also `checkpoint_dots_with_no_batch_dims`). One name
    for all stages, or one per stage, separated by commas. Policies of single layers, e.g.
    `layers/1-8=full,layers/9=dots_saveable` or `DecoderBlock=full`, leave other layers at `none`; a later one replaces
    an earlier one. `auto` takes for each stage whatever recomputes least within the memory limit."""
    memory_limit: str | None = None
    """The most bytes that each device may hold by prediction, e.g. `12GiB`, `800MB` or `1500000`. `--schedule auto` and
    `--remat auto` keep to it; XLA's temporary memory inside a program comes on top. None sets no limit."""
    partition: str = "even"
    """How layers are cut into stages: `even` by their number; `cost` by estimated floating-point operations; `measured`
    by times taken on this machine at the start; or by hand, the first layer of every stage: `0,2,4` for layers 0-1, 2-3
    and 4 to the last (the 0 may be left out)."""
    costs: str | None = None
    """Path of a JSON file of layer costs, in seconds and bytes, which `meshpipe plan RECIPE --profile --save-costs
    FILE.json` writes. `--partition measured` and `--schedule auto` read it instead of measuring; None measures."""

    def __post_init__(self) -> None:
        for name in ("stages_per_rank", "num_microbatches"):
            if getattr(self, name) is not None or name == "num_microbatches":
                check_whole(name, getattr(self, name), below=SIZE_LIMIT)
        for name in ("schedule", "remat", "partition", "memory_limit", "costs"):
            self._check_text(name)
        expand_fields(self, "costs", *(["schedule"] if self.schedule.endswith(".txt") else []))
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)
        self._check_remat()
        if self.partition not in PARTITIONS and not re.fullmatch(r"\d+(,\d+)*", self.partition):
            raise ArgumentError(
                f"`partition` must be one of {', '.join(PARTITIONS)}, or the first layers of the stages with commas "
                f"between them, e.g. 0,2,4. Got {self.partition!r}."
            )
        if self.costs is not None and not self.needs_costs:
            raise ArgumentError(
                "`costs` is for `partition` measured and `schedule` auto. "
                f"Got {self.costs!r} with `partition` {self.partition} and `schedule` {self.schedule}. Leave it out."
            )

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, str) and not (value is None and name in ("memory_limit", "costs")):
            raise ArgumentError(f"`{name}` must be a string. Got {value!r}, {kind_of(value)}.{_as_text(value)}")

    @property
    def needs_costs(self) -> bool:
        """Whether the plan or the partition depends on the execution times of layers."""
        return self.schedule == "auto" or self.partition == "measured"

    @property
    def boundaries(self) -> tuple[int, ...] | None:
        """The first layer of every stage after the first; None unless they are given by hand."""
        if self.partition in PARTITIONS:
            return None
        first, *others = map(int, self.partition.split(","))
        return tuple(others) if first == 0 else (first, *others)

    def _check_remat(self) -> None:
        check_remat(self.remat)
        if self.remat == "auto" and self.memory_limit is None:
            raise ArgumentError("`remat` auto needs a memory limit. Add e.g. `memory_limit` 12GiB.")
        if self.memory_limit is not None and "auto" not in (self.remat, self.schedule):
            raise ArgumentError(
                f"`memory_limit` is only for `schedule` auto and `remat` auto. Got {self.memory_limit} "
                f"with `schedule` {self.schedule} and `remat` {self.remat}. Leave it out, or pass one of the two."
            )


def _as_text(value: object) -> str:
    """How to write a list, a dict or a number as text, where one was given."""
    if isinstance(value, dict):
        return f" Write {','.join(f'{key}={item}' for key, item in value.items())!r}."
    if isinstance(value, list | tuple):
        return f" Write {','.join(map(str, value))!r}."
    return f" Write {str(value)!r}." if isinstance(value, int) and not isinstance(value, bool) else ""


UNITS = {prefix + "B": 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T"))} | {
    prefix + "iB": 1024**power for power, prefix in enumerate(("", "K", "M", "G", "T")) if prefix
}


def parse_bytes(text: str) -> int:
    """Parses a number of bytes such as `12GiB`, `1.5 GB` or `800000`.

    Units are powers of 1000 (kB, MB, GB, TB) or of 1024 (KiB, MiB, GiB, TiB), in upper or lower case. Raises
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
