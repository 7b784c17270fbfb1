"""Puts together the order of one rank, each stage taking the microbatches in turn."""

from collections import Counter, deque
from collections.abc import Iterable

from meshpipe.plan.plan import Action, Op


class Order:
    """The actions of a rank, as many as have been added."""

    def __init__(self) -> None:
        self._actions: list[Action] = []
        self._forwards: Counter[int] = Counter()
        self._backwards: Counter[int] = Counter()
        self._waiting: dict[int, deque[int]] = {}

    def forward(self, stage: int) -> None:
        """Adds the forward of the stage on its next microbatch."""
        self._actions.append(Action(stage, Op.FORWARD, self._forwards[stage]))
        self._forwards[stage] += 1

    def backward(self, stage: int) -> None:
        """Adds the whole backward of the stage on its next microbatch."""
        self._actions.append(Action(stage, Op.BACKWARD, self._backwards[stage]))
        self._backwards[stage] += 1

    def backward_input(self, stage: int) -> None:
        """Adds the first part of backward on the next microbatch; the other part waits for `backward_weight`."""
        microbatch = self._backwards[stage]
        self._actions.append(Action(stage, Op.BACKWARD_INPUT, microbatch))
        self._waiting.setdefault(stage, deque()).append(microbatch)
        self._backwards[stage] += 1

    def backward_weight(self, stage: int) -> None:
        """Adds the other part on the microbatch of the stage that has waited longest for it."""
        self._actions.append(Action(stage, Op.BACKWARD_WEIGHT, self._waiting[stage].popleft()))

    def waiting(self, stage: int) -> int:
        """How many microbatches of the stage wait for the other part of backward."""
        return len(self._waiting.get(stage, ()))

    def forwards(self, stage: int) -> int:
        """How many microbatches have gone forward through the stage."""
        return self._forwards[stage]

    def backwards(self, stage: int) -> int:
        """How many microbatches have gone back through the stage."""
        return self._backwards[stage]

    def up_to(self, num_microbatches: int) -> tuple[Action, ...]:
        """The order without the microbatches from that number on: what is left needs nothing of what is left out."""
        return tuple(action for action in self._actions if action.microbatch < num_microbatches)


def loop(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The ranks of stages dealt in turn: stage s on rank s mod R."""
    return tuple(range(num_ranks)) * stages_per_rank


def zigzag(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The ranks of stages that go to the last rank, back to the first, and so on: with two per rank, a V."""
    down = tuple(range(num_ranks))
    return tuple(rank for turn in range(stages_per_rank) for rank in (down[::-1] if turn % 2 else down))


def sweep(op: Op, stages: Iterable[int], num_microbatches: int) -> tuple[Action, ...]:
    """Every stage in turn, on all microbatches."""
    return tuple(Action(stage, op, microbatch) for stage in stages for microbatch in range(num_microbatches))
