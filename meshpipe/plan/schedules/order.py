"""Builds the order of one rank. Each stage takes the microbatches in turn."""

from collections import Counter, deque
from collections.abc import Iterable

from meshpipe.plan.plan import Action, Op


class Order:
    """The actions of a rank, in the order in which they were added."""

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
        """Adds the input part of the next backward; its weight part waits for `backward_weight`."""
        microbatch = self._backwards[stage]
        self._actions.append(Action(stage, Op.BACKWARD_INPUT, microbatch))
        self._waiting.setdefault(stage, deque()).append(microbatch)
        self._backwards[stage] += 1

    def backward_weight(self, stage: int) -> None:
        """Adds the weight part that has waited longest."""
        self._actions.append(Action(stage, Op.BACKWARD_WEIGHT, self._waiting[stage].popleft()))

    def waiting(self, stage: int) -> int:
        """The number of microbatches of the stage whose weight part has not been added."""
        return len(self._waiting.get(stage, ()))

    def forwards(self, stage: int) -> int:
        """The number of forwards of the stage."""
        return self._forwards[stage]

    def backwards(self, stage: int) -> int:
        """The number of backwards of the stage, whole or only their input part."""
        return self._backwards[stage]

    def up_to(self, num_microbatches: int) -> tuple[Action, ...]:
        """The order without the microbatches from that number on, which no other microbatch depends on."""
        return tuple(action for action in self._actions if action.microbatch < num_microbatches)


def loop(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The rank of every stage: stage s is on rank s mod R."""
    return tuple(range(num_ranks)) * stages_per_rank


def zigzag(num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The rank of every stage, from the first rank to the last, back again, and so on; two per rank make a V."""
    down = tuple(range(num_ranks))
    return tuple(rank for turn in range(stages_per_rank) for rank in (down[::-1] if turn % 2 else down))


def sweep(op: Op, stages: Iterable[int], num_microbatches: int) -> tuple[Action, ...]:
    """Each stage in turn runs all microbatches."""
    return tuple(Action(stage, op, microbatch) for stage in stages for microbatch in range(num_microbatches))
