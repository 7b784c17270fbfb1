"""Makes orders from costs: whenever a rank is free, it takes the available work that it prefers."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from meshpipe.plan.graph import Graph, chain
from meshpipe.plan.plan import Action, Op
from meshpipe.plan.simulate import Costs
from meshpipe.plan.stage_memory import StageMemory, on_graph


@dataclass(frozen=True)
class Rule:
    """The rule by which a free rank chooses.

    Among stages it prefers the deeper, which bring the last results. It takes weights where there is nothing else, and
    of the shallowest stage first, which holds its activations longest.
    """

    num_whole: int = 0
    """Microbatches, the first ones, whose backward is not split: that can take longer, and helps most at the end."""
    forward_first: bool = False
    """Whether a forward, where memory has space for it, goes before a backward."""
    patience: float = 0.0
    """Rather than start what it prefers less, a rank waits for what comes within this share of its time."""


class _Candidate(NamedTuple):
    """A piece of work that the rank could take now or later."""

    preference: int
    """Less is better."""
    op: Op
    stage: int
    ready: float


def greedy_orders(
    stage_ranks: Sequence[int],
    num_microbatches: int,
    costs: Costs,
    memory: Sequence[StageMemory],
    space: Sequence[float],
    rule: Rule,
    graph: Graph | None = None,
) -> tuple[tuple[Action, ...], ...] | None:
    """The order of every rank, in which no rank holds more than its space of activations, in bytes.

    Without a graph, the stages are a chain.

    None if a rank has not the space for one microbatch at all its stages; there is an order in any other case. Takes
    time linear in the number of actions.
    """
    graph = chain(len(stage_ranks)) if graph is None else graph
    run = _Run(stage_ranks, num_microbatches, costs, on_graph(memory, graph), space, rule, graph)
    return run.orders() if run.has_space() else None


class _Run:
    """What has been done and what is held, while orders are made."""

    def __init__(
        self,
        stage_ranks: Sequence[int],
        num_microbatches: int,
        costs: Costs,
        memory: Sequence[StageMemory],
        space: Sequence[float],
        rule: Rule,
        graph: Graph,
    ):
        self.stage_ranks, self.num_microbatches, self.rule, self.graph = stage_ranks, num_microbatches, rule, graph
        self.transfer = costs.transfer
        num_stages, num_ranks = len(stage_ranks), len(space)
        self.stages = [[s for s in reversed(range(num_stages)) if stage_ranks[s] == r] for r in range(num_ranks)]
        self.times = {(s, op): costs.time(s, op) for s in range(num_stages) for op in Op}
        splits = rule.num_whole < num_microbatches
        self.held_after_forward, self.held_after_input = _held(memory, splits)
        # The stages that wait for an F of another, and those that wait for a gradient of it.
        self.readers = [[r for r in range(num_stages) if s in graph.sources(r)] for s in range(num_stages)]
        self.writers = [[w for w in range(num_stages) if s in graph.readers(w)] for s in range(num_stages)]
        # An I runs while both what it reads and what it makes are there: space for one of those is set aside.
        made = [max(memory[s].made_for_weights for s in stages) if splits else 0.0 for stages in self.stages]
        self.space = [(total - most) * (1 + 1e-9) for total, most in zip(space, made, strict=True)]
        self.held = [0.0] * num_ranks
        # Microbatches of each stage that are through forward, through B or I, and through B or W.
        self.forwards, self.backwards, self.finished = ([0] * num_stages for _ in range(3))
        self.inputs = [_Arrivals(len(graph.sources(s)), num_microbatches) for s in range(num_stages)]
        # A stage whose outputs nobody reads waits for its own forward.
        self.gradients = [_Arrivals(len(graph.readers(s)) or 1, num_microbatches) for s in range(num_stages)]

    def has_space(self) -> bool:
        needed = [sum(self.held_after_forward[s] for s in stages) for stages in self.stages]
        return all(need <= space for need, space in zip(needed, self.space, strict=True))

    def orders(self) -> tuple[tuple[Action, ...], ...]:
        """Follows time from event to event: an event is a rank that becomes free, or work that arrives at it."""
        num_ranks = len(self.stages)
        orders: list[list[Action]] = [[] for _ in range(num_ranks)]
        free_at = [0.0] * num_ranks
        self.events = [(0.0, rank) for rank in range(num_ranks)]
        while self.events:
            now, rank = heapq.heappop(self.events)
            if free_at[rank] > now:
                continue
            chosen = self._choose(rank, now)
            if chosen is None:
                continue
            end = now + self.times[chosen.stage, chosen.op]
            orders[rank].append(self._take(rank, chosen, end))
            free_at[rank] = end
            heapq.heappush(self.events, (end, rank))
        return tuple(map(tuple, orders))

    def _choose(self, rank: int, now: float) -> _Candidate | None:
        """The candidate to start now, if there is one; what is worth waiting for will be an event of its own."""
        candidates = self._candidates(rank)
        chosen = min((c for c in candidates if c.ready <= now), key=lambda c: c.preference, default=None)
        if chosen is None or not self.rule.patience:
            return chosen
        latest = now + self.rule.patience * self.times[chosen.stage, chosen.op]
        better = any(c.preference < chosen.preference and c.ready < latest for c in candidates)
        return None if better else chosen

    def _candidates(self, rank: int) -> list[_Candidate]:
        first, second = (1, 0) if self.rule.forward_first else (0, 1)
        reserved = 0.0  # for deeper stages: without it, shallow ones could take all space for ever
        found = []
        for stage in self.stages[rank]:
            forwards, backwards = self.forwards[stage], self.backwards[stage]
            if backwards < forwards and self.graph.has_backward(stage):
                is_whole = backwards < self.rule.num_whole or not self.graph.trains[stage]
                op = Op.BACKWARD if is_whole else Op.BACKWARD_INPUT
                found.append(_Candidate(first, op, stage, self.gradients[stage].times[backwards]))
            if forwards < self.num_microbatches:
                needed = self.held[rank] + self.held_after_forward[stage] + reserved
                if needed <= self.space[rank]:
                    found.append(_Candidate(second, Op.FORWARD, stage, self.inputs[stage].times[forwards]))
                reserved += self._missing(stage)
        for stage in reversed(self.stages[rank]):
            if self.finished[stage] < self.backwards[stage]:
                found.append(_Candidate(2, Op.BACKWARD_WEIGHT, stage, 0.0))
        return found

    def _missing(self, stage: int) -> float:
        """What the stage does not hold of the space for one microbatch, and would have to find to go on."""
        if self.backwards[stage] < self.forwards[stage]:
            return 0.0
        waits = self.finished[stage] < self.forwards[stage]
        return self.held_after_forward[stage] - (self.held_after_input[stage] if waits else 0.0)

    def _take(self, rank: int, chosen: _Candidate, end: float) -> Action:
        stage, op = chosen.stage, chosen.op
        if op is Op.FORWARD:
            microbatch = self.forwards[stage]
            self.forwards[stage] += 1
            self.held[rank] += self.held_after_forward[stage]
            for reader in self.readers[stage]:
                self._arrive(self.inputs, reader, microbatch, rank, end)
            if not self.graph.readers(stage):
                self.gradients[stage].add(microbatch, end)
            return Action(stage, op, microbatch)
        if op is Op.BACKWARD_WEIGHT:
            microbatch = self.finished[stage]
        else:
            microbatch = self.backwards[stage]
            self.backwards[stage] += 1
            self.held[rank] -= self.held_after_forward[stage] - self.held_after_input[stage]
            for writer in self.writers[stage]:
                self._arrive(self.gradients, writer, microbatch, rank, end)
        if op is not Op.BACKWARD_INPUT:
            self.finished[stage] += 1
            self.held[rank] -= self.held_after_input[stage]
        return Action(stage, op, microbatch)

    def _arrive(self, table: "list[_Arrivals]", stage: int, microbatch: int, sender: int, end: float) -> None:
        receiver = self.stage_ranks[stage]
        time = end + (self.transfer if receiver != sender else 0.0)
        if table[stage].add(microbatch, time):
            heapq.heappush(self.events, (table[stage].times[microbatch], receiver))


class _Arrivals:
    """When a stage has all that it waits for, of each microbatch."""

    def __init__(self, count: int, num_microbatches: int):
        self.times = [math.inf if count else 0.0] * num_microbatches
        """Infinite as long as something is missing."""
        self._missing = [count] * num_microbatches
        self._latest = [0.0] * num_microbatches

    def add(self, microbatch: int, time: float) -> bool:
        """One more arrives at that time. Whether it was the last."""
        self._missing[microbatch] -= 1
        self._latest[microbatch] = max(self._latest[microbatch], time)
        if self._missing[microbatch]:
            return False
        self.times[microbatch] = self._latest[microbatch]
        return True


def _held(memory: Sequence[StageMemory], splits: bool) -> tuple[list[float], list[float]]:
    """Bytes held for a microbatch after its forward, and after its I: at no time more than after its forward."""
    if not splits:
        return [m.activation for m in memory], [0.0] * len(memory)
    after_input = [m.kept_for_weights + m.made_for_weights for m in memory]
    return [max(m.activation, later) for m, later in zip(memory, after_input, strict=True)], after_input
