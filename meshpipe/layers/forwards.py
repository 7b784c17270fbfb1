"""The forwards of all stages in evaluation mode, compiled for batches of one size: to sum up losses, or for outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from meshpipe.errors import ArgumentError
from meshpipe.layers.microbatches import Microbatches
from meshpipe.pipeline.executor import Executor
from meshpipe.plan.graph import Graph
from meshpipe.plan.lower import lower
from meshpipe.plan.plan import Plan
from meshpipe.plan.schedules import forwards_of
from meshpipe.stage.programs import StagePrograms
from meshpipe.stage.spec import Boundary
from meshpipe.stage.traced import TracedStage


@dataclass(frozen=True, kw_only=True)
class Forwards:
    """What a batch is run through without a backward; `StagedModel.forwards` compiles it."""

    name: str
    """Begins the names of its transfers; no other forwards have it."""
    plan: Plan
    """Of training: the forwards follow its order."""
    graph: Graph
    """The values that stages hand to each other; loss and metrics of evaluation may read others than those of
    training."""
    microbatches: Microbatches
    meshes: Sequence[Mesh]
    """The submesh of every stage."""
    traced: Mapping[int, TracedStage]
    """The stages of this process; likewise the programs."""
    programs: Mapping[int, StagePrograms]
    path_hashes: Mapping[int, jax.Array]
    adds_up_early: bool
    """Whether stages before the last one have sums too, which layers sow."""
    output: Boundary | None
    """What the last layer puts out for a microbatch, where that is kept in place of a loss."""
    _executors: dict[int, Executor] = field(default_factory=dict)

    def executor(self, count: int | None = None) -> Executor:
        """Runs the first `count` microbatches of a batch, or all; made at its first use, without compiling anything."""
        count = self.microbatches.count if count is None else count
        if count not in self._executors:
            lowered = lower(forwards_of(self.plan, count).on(self.graph), reduces=True, outputs=self.output is not None)
            name = f"{self.name}/{count}"
            self._executors[count] = Executor(name, lowered, self.meshes, self.traced, self.programs)
        return self._executors[count]

    def inputs(self, batch: Mapping[str, Any], seed: Mapping[int, jax.Array]) -> dict[int, Any]:
        """What every local stage reads of a whole batch, split into microbatches on its submesh."""
        return self.microbatches.place(self.traced, batch, 0, seed, self.path_hashes)


def check_rows(output: Boundary, size: int) -> None:
    """Raises `ArgumentError` unless every array that the last layer puts out has a row for each example."""
    for leaf in output.leaves:
        if leaf.shape[:1] != (size,):
            raise ArgumentError(
                "To predict, every array that the last layer returns must have one row for each example. Got shape "
                f"{tuple(leaf.shape)} for a microbatch of {size}. Call the layers themselves: `Trainer.modules` "
                "returns them."
            )
