"""What every rank computes in one step, and in which order: plain data with a text form."""

import enum
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from meshpipe.plan.graph import Graph, Value, chain
from meshpipe.plan.grid import draw, draw_html, draw_pages, time_columns


class PlanError(ValueError):
    """A plan, or its text, breaks a rule; the message says which, draws where, and gives the way out."""


class Op(enum.StrEnum):
    """The kinds of work. BACKWARD is BACKWARD_INPUT followed by BACKWARD_WEIGHT, as one action."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"

    @property
    def meaning(self) -> str:
        """`forward` for F, and so on."""
        return _MEANINGS[self]

    # An enumeration's own hash is a Python function, which is slow; actions are the keys of every table of a plan.
    __hash__ = str.__hash__

    @property
    def accumulates(self) -> bool:
        """Whether it accumulates parameter gradients, and is the last to read the residuals of its forward."""
        return self is Op.BACKWARD or self is Op.BACKWARD_WEIGHT


_MEANINGS = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward, input",
    Op.BACKWARD_WEIGHT: "backward, weight",
}


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One cell of a plan: `2F0` is stage 2, forward, microbatch 0."""

    stage: int
    """The stage that does it, from 0; stage 0 has the first layers."""
    op: Op
    """What it does."""
    microbatch: int
    """The microbatch that it does it for, from 0."""

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        """Reads what `str` writes; raises `PlanError` for any other text."""
        match = re.fullmatch(r"([0-9]{1,9})([FBIW])([0-9]{1,9})", text)
        if match is None:
            raise PlanError(
                "An action is a stage, one of the letters F, B, I, W and a microbatch, e.g. 2F0 for the forward of "
                f"stage 2 on microbatch 0. Got {text!r}."
            )
        return cls(int(match[1]), Op(match[2]), int(match[3]))


_CHAIN = Graph((), ())
"""Stands for the chain of as many trained stages as a plan has."""


@dataclass(frozen=True)
class Plan:
    """The compute order of every rank over one batch. `validate` checks it; the schedules make valid ones."""

    schedule: str
    """The name of the schedule that made it."""
    num_microbatches: int
    """The number of equal slices of a batch; every stage has actions for each of them."""
    stage_ranks: tuple[int, ...]
    """For each stage, the rank that holds it."""
    orders: tuple[tuple[Action, ...], ...]
    """For each rank, its actions in the order in which it computes them."""
    peak_activations: tuple[int, ...] | None = None
    """For each rank, the most activations that it may hold at once; None promises nothing. An activation is what one
    stage keeps of one microbatch, from its forward until the last backward action that reads it."""
    graph: Graph = _CHAIN
    """What the stages read of each other, and which are trained. Without it, all are trained, and each reads the output
    of the one before."""

    def __post_init__(self) -> None:
        if self.graph is _CHAIN:
            object.__setattr__(self, "graph", chain(len(self.stage_ranks)))

    def on(self, graph: Graph) -> "Plan":
        """The plan for stages that read of each other what the graph says, in the same order.

        A stage that has no backward in the graph loses its backward actions, and one that has a backward and no trained
        parameters makes it in one piece, since nothing is left for its weight part.

        Raises `PlanError` if the plan trains on another graph already, or has another number of stages.
        """
        if graph.num_stages != self.num_stages:
            raise PlanError(
                f"A plan and its graph must have the same stages. Got {graph.num_stages} stages in the graph for a "
                f"plan of {self.num_stages}."
            )
        if not (self.graph == graph or self.graph.is_chain or self.forward_only):
            raise PlanError(
                "A plan that has been made for a graph of stages fits only that graph, since stages without a backward "
                f"have lost theirs. Got a plan with {describe(self.graph)}, for a model with {describe(graph)}. Write "
                "the plan again from its schedule for this model."
            )
        orders = tuple(tuple(kept for action in order if (kept := _on(graph, action))) for order in self.orders)
        return replace(self, orders=orders, graph=graph)

    def has_backward(self, stage: int) -> bool:
        """Whether the stage runs a backward, so that its forward keeps something for it."""
        return not self.forward_only and self.graph.has_backward(stage)

    def __repr__(self) -> str:
        sizes = f"ranks={self.num_ranks}, stages={self.num_stages}, microbatches={self.num_microbatches}"
        return f"Plan({self.schedule}, {sizes}, actions={sum(map(len, self.orders))})"

    def _repr_html_(self) -> str:
        """The grid as a table for notebooks."""
        return draw_html(repr(self), self.orders, time_columns(self.orders, self.start_times()))

    @property
    def num_ranks(self) -> int:
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, first to last."""
        return tuple(stage for stage, holder in enumerate(self.stage_ranks) if holder == rank)

    @cached_property
    def actions(self) -> frozenset[Action]:
        """All actions of all ranks."""
        return frozenset(action for order in self.orders for action in order)

    @cached_property
    def forward_only(self) -> bool:
        """Whether the plan only evaluates, so that no forward keeps residuals."""
        return all(action.op is Op.FORWARD for action in self.actions)

    @cached_property
    def fusible_stage(self) -> int | None:
        """The last stage, if each of its backwards directly follows the forward of the same microbatch; else None."""
        last = self.num_stages - 1
        order = self.orders[self.stage_ranks[last]]
        forwards = ((i, action) for i, action in enumerate(order) if action.stage == last and action.op is Op.FORWARD)
        follows = (order[i + 1 : i + 2] == (Action(last, Op.BACKWARD, action.microbatch),) for i, action in forwards)
        return last if all(follows) else None

    def dependencies(self, action: Action) -> tuple[Action, ...]:
        """The actions, of this rank or others, whose results this one reads."""
        stage, microbatch = action.stage, action.microbatch
        if action.op is Op.FORWARD:
            return tuple([Action(source, Op.FORWARD, microbatch) for source in self.graph.sources(stage)])
        if action.op is Op.BACKWARD_WEIGHT:
            return (Action(stage, Op.BACKWARD_INPUT, microbatch),)
        readers = [self.backward_of(reader, microbatch) for reader in self.graph.readers(stage)]
        return (Action(stage, Op.FORWARD, microbatch), *readers)

    def backward_of(self, stage: int, microbatch: int) -> Action:
        """The action that makes the gradients of what the stage reads: its BACKWARD_INPUT, or else its BACKWARD."""
        split = Action(stage, Op.BACKWARD_INPUT, microbatch)
        return split if split in self.actions else Action(stage, Op.BACKWARD, microbatch)

    def start_times(
        self, duration: Callable[[Action], float] = lambda action: 1, transfer: float = 0.0
    ) -> dict[Action, float]:
        """When each action starts, from 0, if every rank follows its order and starts each action as early as it can.

        Arguments:
            duration: The time that an action takes, in any unit.
            transfer: The time from the end of an action until a dependent action on another rank can start.

        Actions that can never start, because ranks wait for each other in a circle, are left out.
        """
        starts: dict[Action, float] = {}
        ends: dict[Action, float] = {}
        free_at = [0.0] * self.num_ranks
        cursors = [0] * self.num_ranks
        waiting: dict[Action, list[int]] = {}
        ready = list(range(self.num_ranks))
        while ready:
            rank = ready.pop()
            order = self.orders[rank]
            while cursors[rank] < len(order):
                action = order[cursors[rank]]
                start = free_at[rank]
                needs = self.dependencies(action)
                missing = next((need for need in needs if need not in ends), None)
                if missing is not None:
                    waiting.setdefault(missing, []).append(rank)
                    break
                for need in needs:
                    start = max(start, ends[need] + (transfer if self.stage_ranks[need.stage] != rank else 0))
                starts[action] = start
                ends[action] = free_at[rank] = start + duration(action)
                cursors[rank] += 1
                ready += waiting.pop(action, ())
        return starts

    def live_activations(self, rank: int) -> list[int]:
        """The number of activations that the rank holds while each action of its order runs."""
        live, counts = 0, []
        for action in self.orders[rank]:
            live += action.op is Op.FORWARD and self.has_backward(action.stage)
            counts.append(live)
            live -= action.op.accumulates
        return counts

    def grid(self, mark: Action | None = None, width: int | None = None) -> str:
        """Draws ranks as rows and time as columns, every action one unit long; a dot is an idle rank.

        Arguments:
            mark: An action to put in brackets.
            width: The most characters in a row. Of a longer plan, only the part around the mark is drawn, or else the
                beginning. None draws all of it.
        """
        rank = None if mark is None else self.stage_ranks[mark.stage]
        place = None if rank is None or mark is None else (rank, self.orders[rank].index(mark))
        return draw(self.orders, time_columns(self.orders, self.start_times()), place, width)

    def pages(self, width: int) -> Iterator[str]:
        """The grid in parts below each other, each of at most `width` characters in a row."""
        return draw_pages(self.orders, time_columns(self.orders, self.start_times()), width)

    def to_text(self) -> str:
        """The plan as text that `Plan.parse` reads: a few header lines, then one line per rank."""
        lines = [
            f"schedule: {self.schedule}",
            f"microbatches: {self.num_microbatches}",
            f"stage ranks: {' '.join(map(str, self.stage_ranks))}",
        ]
        if self.peak_activations is not None:
            lines.append(f"peak activations: {' '.join(map(str, self.peak_activations))}")
        lines += _graph_lines(self.graph)
        lines += [f"rank {rank}: {' '.join(map(str, order))}".rstrip() for rank, order in enumerate(self.orders)]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Reads what `to_text` writes; blank lines and text after a `#` are skipped.

        Raises `PlanError` that names the line when the text is malformed. Does not check the plan: `validate` does.
        """
        fields, orders = _parse_lines(text)
        (num_microbatches,) = _integers("microbatches", fields, exactly_one=True)
        peak_activations = _integers("peak activations", fields) if "peak activations" in fields else None
        stage_ranks = _integers("stage ranks", fields)
        graph = _parse_graph(fields, len(stage_ranks))
        return cls(fields["schedule"], num_microbatches, stage_ranks, orders, peak_activations, graph)


_KEYS = ("schedule", "microbatches", "stage ranks", "peak activations", "frozen stages", "values")


def _on(graph: Graph, action: Action) -> Action | None:
    """What is left of an action in the graph."""
    stage, op, microbatch = action.stage, action.op, action.microbatch
    if op is Op.FORWARD or graph.trains[stage]:
        return action
    if not graph.has_backward(stage) or op is Op.BACKWARD_WEIGHT:
        return None
    return Action(stage, Op.BACKWARD, microbatch)


def _graph_lines(graph: Graph) -> Iterator[str]:
    """Lines of a plan that say what its graph has besides a chain of trained stages."""
    if not all(graph.trains):
        frozen = (str(stage) for stage, trained in enumerate(graph.trains) if not trained)
        yield f"frozen stages: {' '.join(frozen)}"
    if graph.values != chain(graph.num_stages).values:
        yield f"values: {'; '.join(map(str, graph.values)) or 'none'}"


def describe(graph: Graph) -> str:
    """In words, what a graph has besides a chain of trained stages."""
    return ", ".join(_graph_lines(graph)) or "a chain of trained stages"


def _parse_graph(fields: dict[str, str], num_stages: int) -> Graph:
    frozen = _integers("frozen stages", fields) if "frozen stages" in fields else ()
    if any(stage >= num_stages for stage in frozen):
        raise PlanError(
            f"`frozen stages` of a plan must be stages from 0 to {num_stages - 1}. Got {fields['frozen stages']!r}."
        )
    trains = tuple(stage not in frozen for stage in range(num_stages))
    text = fields.get("values")
    if text is None:
        return Graph(trains, chain(num_stages).values)
    try:
        values = () if text == "none" else tuple(Value.parse(part.strip()) for part in text.split(";"))
        return Graph(trains, values)
    except ValueError as error:
        raise PlanError(f"`values` of a plan must be a graph of its stages. Got {text!r}: {error}") from None


def _parse_lines(text: str) -> tuple[dict[str, str], tuple[tuple[Action, ...], ...]]:
    fields: dict[str, str] = {}
    orders: list[tuple[Action, ...]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        key, colon, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        if not key and not colon:
            continue
        if key in _KEYS and key not in fields and value:
            fields[key] = value
        elif key == f"rank {len(orders)}" and colon:
            try:
                orders.append(tuple(Action.parse(word) for word in value.split()))
            except PlanError as error:
                raise PlanError(f"Line {number} of the plan: {error}") from None
        else:
            raise PlanError(
                "The text of a plan has the lines `schedule: NAME`, `microbatches: COUNT`, `stage ranks: RANK ...` and "
                "perhaps `peak activations: COUNT ...`, `frozen stages: STAGE ...` and "
                "`values: NAME STAGE -> STAGE ...; ...`, each once, and `rank 0: ACTION ...`, `rank 1: ACTION ...` in "
                f"order. Got {line.strip()!r} on line {number}."
            )
    missing = [key for key in ("schedule", "microbatches", "stage ranks") if key not in fields]
    if missing:
        raise PlanError(
            f"The text of a plan needs the lines schedule, microbatches and stage ranks. Add {missing[0]!r}."
        )
    return fields, tuple(orders)


def _integers(key: str, fields: dict[str, str], exactly_one: bool = False) -> tuple[int, ...]:
    words = fields[key].split()
    if not all(re.fullmatch("[0-9]{1,9}", word) for word in words) or (exactly_one and len(words) > 1):
        what = "one whole number" if exactly_one else "whole numbers with spaces between them"
        raise PlanError(f"`{key}` of a plan must be {what}. Got {fields[key]!r}.")
    return tuple(map(int, words))
