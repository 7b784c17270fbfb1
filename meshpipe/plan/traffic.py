"""Counts what moves between ranks in a step, from the transfers of the lowered plan."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshpipe.plan.graph import Value
from meshpipe.plan.lower import LoweredPlan, Transfer
from meshpipe.plan.stage_memory import StageMemory


@dataclass(frozen=True)
class Traffic:
    """What moves of one value in a step, over all microbatches, in the unit in which the stages' memory is given."""

    forward: int | float
    """Bytes of the value, once for each rank that it moves to."""
    backward: int | float
    """Bytes of its gradients, from each reader on another rank."""
    moves: int
    """Transfers of the value."""
    moves_back: int
    """Transfers of gradients."""

    @property
    def total(self) -> int | float:
        return self.forward + self.backward


def traffic(lowered: LoweredPlan, memory: Sequence[StageMemory]) -> Mapping[Value, Traffic]:
    """What moves of every value of the plan's graph. `memory` has the sizes of the inputs of every stage."""
    graph = lowered.plan.graph
    sizes: Counter[tuple[Value, str]] = Counter()
    moves: Counter[tuple[Value, str]] = Counter()
    for transfer in lowered.instructions:
        if not isinstance(transfer, Transfer):
            continue
        # Both kinds of transfers have the stage that reads the value, at one of their ends.
        kind = transfer.target.kind
        reader = transfer.target.stage if kind == "x" else transfer.source.stage
        inputs = graph.inputs(reader)
        place = [value.name for value in inputs].index(transfer.target.name)
        held = memory[reader].inputs if kind == "x" else memory[reader].input_gradients
        sizes[inputs[place], kind] += held[place]  # type: ignore[assignment]
        moves[inputs[place], kind] += 1
    return {
        value: Traffic(sizes[value, "x"], sizes[value, "dy"], moves[value, "x"], moves[value, "dy"])
        for value in graph.values
    }
