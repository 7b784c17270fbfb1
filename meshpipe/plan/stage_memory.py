"""What a stage holds of each microbatch, and for how long."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshpipe.plan.graph import Graph
from meshpipe.plan.plan import Action, Op


@dataclass(frozen=True)
class StageMemory:
    """Bytes that a stage holds on each device of its rank, per microbatch unless the field says otherwise."""

    activation: float
    """From F until B, or until I."""
    kept_for_weights: float = 0.0
    """The part of `activation` that stays until W where backward is split."""
    made_for_weights: float = 0.0
    """What I adds to it, until W."""
    always: float = 0.0
    """For the whole step: parameters, gradients, optimizer state and the batch."""
    inputs: tuple[float, ...] = ()
    """Each value that it reads, in the order of the graph, from its arrival on the rank until the F of its last reader
    there ends. The source holds it while it computes and sends it."""
    kept_inputs: tuple[float, ...] = ()
    """The part of each of them that stays as a part of `activation`."""
    input_gradients: tuple[float, ...] = ()
    """The gradient of each of them, which goes to its source and is held there until the B or I of that ends."""
    recomputed: float = 0.0
    """What a program of its own recomputes for B or I (rematerialisation), while that runs."""
    temporaries: Mapping[Op, float] = field(default_factory=dict)
    """What the program of each kind of work needs inside itself, while it runs."""
    found_for_weights: float = 0.0
    """The part of `made_for_weights` that other fields count while I runs: output gradients, and what is recomputed."""
    new_state: float = 0.0
    """State that F changes, while it runs: until it ends, the old state exists too."""

    def __post_init__(self) -> None:
        for what, counts in vars(self).items():
            sizes = counts.values() if isinstance(counts, Mapping) else counts
            for count in sizes if isinstance(counts, Mapping | tuple) else (counts,):
                if not 0 <= count < math.inf:
                    raise ValueError(f"A number of bytes must be 0 or more, and finite. Got {count} for {what}.")

    @property
    def kept_of_inputs(self) -> float:
        """The part of `activation` that it shares with other readers of its inputs."""
        return sum(self.kept_inputs)


def on_graph(memory: Sequence[StageMemory], graph: Graph) -> list[StageMemory]:
    """The memory of stages of which those without a backward keep nothing, and the untrained ones nothing until W."""
    found = []
    for stage, held in enumerate(memory):
        if not graph.has_backward(stage):
            held = replace(held, activation=0.0, kept_inputs=(), input_gradients=(), recomputed=0.0)
        if not graph.trains[stage]:
            held = replace(held, kept_for_weights=0.0, made_for_weights=0.0, found_for_weights=0.0)
        found.append(held)
    return found


def bytes_of(memory: StageMemory, action: Action) -> tuple[float, float]:
    """What an action takes for other actions when it starts, and what it gives back of that when it ends.

    What it needs only while it runs, and values in transit, are not included.
    """
    match action.op:
        case Op.FORWARD:
            return memory.activation, 0.0
        case Op.BACKWARD:
            return 0.0, memory.activation
        case Op.BACKWARD_INPUT:
            return memory.made_for_weights, memory.activation - memory.kept_for_weights
        case Op.BACKWARD_WEIGHT:
            return 0.0, memory.kept_for_weights + memory.made_for_weights
