"""All layouts of a number of devices that a batch and a model allow."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshpipe.advise.layout import Layout
from meshpipe.plan.schedules import STAGES_PER_RANK, takes_stages

STAGES = (1, 2, 4)
"""Stages per rank that are tried, where the schedule allows them."""
REMATS = ("none", "dots_saveable", "dots_with_no_batch_dims_saveable", "layer", "full")
"""From what recomputes least to what stores least."""
MOST_MICROBATCHES = 256
"""Of a step: more of them only add host time."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched. The layouts have all the devices, on three axes."""

    num_devices: int
    batch_size: int
    num_layers: int
    can_shard: bool = True
    """Whether the model names an axis that fully sharded parameters split."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Layout` with the value that they must have."""

    def layouts(self) -> Iterator[Layout]:
        """Every layout, those with fewer pipeline ranks first."""
        for pipeline in self._allowed("pipeline", divisors(self.num_devices)):
            for data in self._allowed("data", divisors(self.num_devices // pipeline)):
                for tensor in self._allowed("tensor", [self.num_devices // pipeline // data]):
                    yield from self._on_mesh(pipeline, data, tensor)

    def _allowed(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        return [value for value in values if self.fixed.get(name, value) == value]

    def _on_mesh(self, pipeline: int, data: int, tensor: int) -> Iterator[Layout]:
        if self.batch_size % data:
            return
        shardings = ("replicated", "fully-sharded") if data > 1 and self.can_shard else ("replicated",)
        for sharding in self._allowed("sharding", shardings):
            for schedule, stages in self._schedules(pipeline):
                for count in self._allowed("num_microbatches", divisors(self.batch_size // data)):
                    if count > max(MOST_MICROBATCHES, self.fixed.get("num_microbatches", 0)):
                        break
                    for remat in self._remats(pipeline, count):
                        yield Layout(
                            pipeline=pipeline,
                            data=data,
                            tensor=tensor,
                            sharding=sharding,
                            schedule=schedule,
                            stages_per_rank=stages,
                            num_microbatches=count,
                            remat=remat,
                        )

    def _schedules(self, pipeline: int) -> Iterator[tuple[str, int]]:
        if pipeline == 1:  # all schedules are the same
            yield self.fixed.get("schedule", "1f1b"), self.fixed.get("stages_per_rank") or 1
            return
        for schedule in self._allowed("schedule", [name for name in STAGES_PER_RANK if name != "inference"]):
            for stages in (self.fixed["stages_per_rank"],) if self.fixed.get("stages_per_rank") else STAGES:
                if takes_stages(schedule, stages) and pipeline * stages <= self.num_layers:
                    yield schedule, stages

    def _remats(self, pipeline: int, count: int) -> Sequence[str]:
        # To recompute the only stage on its only microbatch stores no less than to keep it.
        return self._allowed("remat", [remat for remat in REMATS if remat != "full" or pipeline * count > 1])


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
