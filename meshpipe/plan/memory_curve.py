"""Follows what a rank holds over the time of a step: activations, and values and gradients that wait."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from meshpipe.plan.graph import Value
from meshpipe.plan.plan import Action, Op, Plan
from meshpipe.plan.stage_memory import StageMemory, bytes_of, on_graph

FROM_LOWER, GIVEN_BACK, FROM_HIGHER, TAKEN, AT_LAST = range(5)
"""The order of changes at one time.

What a lower rank sends is there before what ends is given back, and what a higher rank sends is not: so the executor
hands out work.
"""


class _End(NamedTuple):
    """When bytes are given back."""

    time: float
    place: int
    rank: int = 0
    """Of several at one time and place, the lowest rank comes first."""
    action: Action | None = None
    """The action of the rank whose end it is; None for another time."""


class MemoryCurve:
    """The bytes that each device of one rank holds. See `Timeline.memory_curve`, whose fields the arguments are."""

    def __init__(
        self,
        rank: int,
        plan: Plan,
        starts: Mapping[Action, float],
        ends: Mapping[Action, float],
        memory: Sequence[StageMemory],
        transfer: float,
        late: Collection[str],
    ):
        self._rank, self._plan, self._starts, self._ends = rank, plan, starts, ends
        self._memory, self._transfer, self._late = on_graph(memory, plan.graph), transfer, late
        self._taken: dict[Action, float] = defaultdict(float)
        self._given_back: dict[Action, float] = defaultdict(float)
        self._others: list[tuple[float, int, int, float]] = []
        for action in plan.orders[rank]:
            self._add_action(action)
        for value in plan.graph.values:
            if any(plan.stage_ranks[stage] == rank for stage in (value.source, *value.targets)):
                self._add_value(value)

    def points(self) -> list[tuple[float, float]]:
        """Times at which the bytes change, in order, with the bytes from then on."""
        changes = list(self._others)
        for action in self._plan.orders[self._rank]:
            changes.append((self._starts[action], TAKEN, 0, self._taken[action]))
            changes.append((*self._end_of(action)[:3], -self._given_back[action]))
        changes.sort(key=lambda change: change[:3])
        always = sum(self._memory[stage].always for stage in self._plan.stages_of(self._rank))
        totals = accumulate((change for *_, change in changes), initial=always)
        return list(zip((0.0, *(time for time, *_ in changes)), totals, strict=True))

    def _add_action(self, action: Action) -> None:
        """What an action takes and gives back of its own: no values and gradients of the graph."""
        stage = self._memory[action.stage]
        taken, given_back = bytes_of(stage, action)
        if action.op is Op.FORWARD:
            if not self._plan.has_backward(action.stage):
                taken = 0.0
            else:
                taken -= stage.kept_of_inputs
            taken, given_back = taken + stage.new_state, given_back + stage.new_state
        elif action.op is not Op.BACKWARD_WEIGHT:
            found = stage.found_for_weights if action.op is Op.BACKWARD_INPUT else 0.0
            only_inside = stage.recomputed - found
            taken, given_back = taken + only_inside, given_back + only_inside - stage.kept_of_inputs
        inside = stage.temporaries.get(action.op, 0.0)
        taken, given_back = taken + inside, given_back + inside
        self._taken[action] += taken
        self._given_back[action] += given_back

    def _add_value(self, value: Value) -> None:
        plan, graph, ranks = self._plan, self._plan.graph, self._plan.stage_ranks
        places = {target: graph.inputs(target).index(value) for target in value.targets}
        kept = {
            stage: _at(self._memory[stage].kept_inputs, place) if plan.has_backward(stage) else 0.0
            for stage, place in places.items()
            if ranks[stage] == self._rank
        }
        size = max(_at(self._memory[stage].inputs, place) for stage, place in places.items())
        for microbatch in range(plan.num_microbatches):
            if size and (kept or ranks[value.source] == self._rank):
                self._hold(value, size, kept, microbatch)
            if graph.has_gradient(value) and not plan.forward_only:
                for stage, place in places.items():
                    gradient = _at(self._memory[stage].input_gradients, place)
                    if gradient:
                        self._send_back(value, stage, gradient, microbatch)

    def _hold(self, value: Value, size: float, kept: Mapping[int, float], microbatch: int) -> None:
        """A value on this rank: all of it up to its last use, then what the activations of its readers keep of it."""
        ranks, source = self._plan.stage_ranks, Action(value.source, Op.FORWARD, microbatch)
        home = ranks[value.source]
        readers = self._first_readers(value, microbatch)
        uses = [self._end_of(Action(stage, Op.FORWARD, microbatch)) for stage in kept]
        if home == self._rank:
            self._taken[source] += size
            uses += [self._sent(value, source, reader) for reader in readers.values()]
        elif value.name in self._late:
            arrival = max(self._ends[source], self._starts[readers[self._rank]] - self._transfer)
            self._others.append((arrival, FROM_HIGHER, home, size))
        else:
            self._others.append((self._ends[source], self._from(home), home, size))
        levels = [(max(uses, key=lambda end: end[:3]), size)]
        for stage, part in kept.items():
            if part:
                levels.append((self._end_of(self._plan.backward_of(stage, microbatch)), part))
        levels.sort(key=lambda level: level[0][:3])
        held = size
        for index, (end, _) in enumerate(levels):
            left = max((part for _, part in levels[index + 1 :]), default=0.0)
            self._give_back(end, held - left)
            held = left

    def _first_readers(self, value: Value, microbatch: int) -> dict[int, Action]:
        """For each other rank that reads the value, the action that does so first."""
        ranks, found = self._plan.stage_ranks, dict[int, Action]()
        for stage in value.targets:
            rank, action = ranks[stage], Action(stage, Op.FORWARD, microbatch)
            if rank != ranks[value.source] and (rank not in found or self._starts[action] < self._starts[found[rank]]):
                found[rank] = action
        return found

    def _sent(self, value: Value, source: Action, reader: Action) -> _End:
        """When the rank of a value's source no longer needs it to send it to the rank of a reader."""
        rank = self._plan.stage_ranks[reader.stage]
        if value.name in self._late:
            return _End(self._ends[reader], self._from(rank), rank)  # where exactly is up to the order of dispatch
        return _End(self._ends[source] + self._transfer, GIVEN_BACK) if self._transfer else self._end_of(source)

    def _from(self, rank: int) -> int:
        return FROM_LOWER if rank < self._rank else FROM_HIGHER

    def _send_back(self, value: Value, reader: int, size: float, microbatch: int) -> None:
        """The gradient of a value that one of its readers makes."""
        ranks = self._plan.stage_ranks
        made, used = (self._plan.backward_of(stage, microbatch) for stage in (reader, value.source))
        stays = ranks[reader] == ranks[value.source]
        if ranks[reader] == self._rank:
            self._taken[made] += size
            if not stays:
                end = self._ends[made] + self._transfer
                self._give_back(_End(end, GIVEN_BACK) if self._transfer else self._end_of(made), size)
        if ranks[value.source] == self._rank:
            if not stays:
                rank = ranks[reader]
                self._others.append((self._ends[made], self._from(rank), rank, size))
            self._give_back(self._end_of(used), size)

    def _end_of(self, action: Action) -> _End:
        end = self._ends[action]
        return _End(end, GIVEN_BACK if end > self._starts[action] else AT_LAST, action=action)

    def _give_back(self, end: _End, size: float) -> None:
        if end.action is not None:
            self._given_back[end.action] += size
        elif size:
            self._others.append((*end[:3], -size))


def _at(sizes: Sequence[int | float], place: int) -> int | float:
    """0 for what is not known."""
    return sizes[place] if place < len(sizes) else 0.0
