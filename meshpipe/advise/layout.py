"""One way to lay a run out: everything about it that does not change what is learned."""

from dataclasses import dataclass, replace
from typing import Literal

from meshpipe.config import Config
from meshpipe.mesh import MeshConfig
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.schedules import STAGES_PER_RANK


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Mesh, sharding and pipeline of a run, as the flags of the same names take them."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    sharding: Literal["replicated", "fully-sharded"] = "replicated"
    schedule: str = "1f1b"
    stages_per_rank: int = 1
    num_microbatches: int = 1
    remat: str = "none"
    partition: str = "even"

    @property
    def num_devices(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def is_sharded(self) -> bool:
        return self.sharding == "fully-sharded"

    @property
    def family(self) -> str:
        """The kinds of parallelism that it uses, e.g. `pipeline + tensor`."""
        kinds = []
        if self.pipeline > 1:
            kinds.append("pipeline")
        if self.data > 1:
            kinds.append("fully sharded" if self.is_sharded else "data")
        if self.tensor > 1:
            kinds.append("tensor")
        return " + ".join(kinds) or "one device"

    @property
    def mesh(self) -> str:
        """`pipeline 4 x tensor 2`: the axes that split something."""
        sizes = {"pipeline": self.pipeline, "data": self.data, "tensor": self.tensor}
        return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "one device"

    @property
    def order(self) -> str:
        """The schedule, with its number of stages per rank where it allows several."""
        if self.pipeline == 1:
            return ""
        least, most = STAGES_PER_RANK[self.schedule]
        return self.schedule if least == most else f"{self.schedule} x {self.stages_per_rank}"

    def configure(self, config: Config) -> Config:
        """The run of a config in this layout. Raises `ValueError` where the batch or the model does not divide."""
        is_default = (
            config.pipeline.stages_per_rank is None and self.stages_per_rank == STAGES_PER_RANK[self.schedule][0]
        )
        pipeline: PipelineConfig = replace(
            config.pipeline,
            schedule=self.schedule,
            stages_per_rank=None if is_default else self.stages_per_rank,
            num_microbatches=self.num_microbatches,
            remat=self.remat,
            partition=self.partition,
            memory_limit=None,
            costs=None,
        )
        mesh = MeshConfig(pipeline=self.pipeline, data=self.data, tensor=self.tensor)
        return replace(config, mesh=mesh, sharding=self.sharding, pipeline=pipeline)
