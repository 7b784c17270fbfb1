"""What every rank computes in one step and in which order: plain data with a text form, and the rules it must obey."""

import enum
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

MESSAGE_WIDTH = 110
"""Characters of a row of a grid drawn in an error message; of a longer plan, the part around the marked cell."""


class PlanError(ValueError):
    """A plan, or its text, breaks a rule; the message says which, draws where, and gives the way out."""


class Op(enum.StrEnum):
    """The kinds of work; BACKWARD is BACKWARD_INPUT and BACKWARD_WEIGHT in one."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"

    @property
    def accumulates(self) -> bool:
        """Whether it adds to the gradients of the parameters, and is the last to need what forward kept."""
        return self is Op.BACKWARD or self is Op.BACKWARD_WEIGHT


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One cell of a plan: `2F0` is stage 2, forward, microbatch 0."""

    stage: int
    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Action":
        match = re.fullmatch(r"([0-9]{1,9})([FBIW])([0-9]{1,9})", text)
        if match is None:
            raise PlanError(
                "An action is a stage, one of the letters F, B, I, W and a microbatch, e.g. 2F0 for the forward of "
                f"stage 2 on microbatch 0. Got {text!r}."
            )
        return cls(int(match[1]), Op(match[2]), int(match[3]))


@dataclass(frozen=True)
class Plan:
    """The compute order of every rank over one batch. `validate` checks it; the schedules make valid ones."""

    schedule: str
    """Name of the rule that made it."""
    num_microbatches: int
    stage_ranks: tuple[int, ...]
    """The rank that holds each stage."""
    orders: tuple[tuple[Action, ...], ...]
    """For each rank, its actions in the order in which it computes them."""
    peak_activations: tuple[int, ...] | None = None
    """For each rank, the most activations it may hold at once, one per stage and microbatch, from forward until the
    last backward action that needs it; None promises nothing."""

    @property
    def num_ranks(self) -> int:
        return len(self.orders)

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage, holder in enumerate(self.stage_ranks) if holder == rank)

    @cached_property
    def actions(self) -> frozenset[Action]:
        return frozenset(action for order in self.orders for action in order)

    @cached_property
    def forward_only(self) -> bool:
        """Whether nothing is trained, so that forward keeps nothing for backward."""
        return all(action.op is Op.FORWARD for action in self.actions)

    def dependencies(self, action: Action) -> tuple[Action, ...]:
        """The actions, of this rank or others, whose results this one reads."""
        stage, microbatch = action.stage, action.microbatch
        if action.op is Op.FORWARD:
            return (Action(stage - 1, Op.FORWARD, microbatch),) if stage > 0 else ()
        if action.op is Op.BACKWARD_WEIGHT:
            return (Action(stage, Op.BACKWARD_INPUT, microbatch),)
        forward = Action(stage, Op.FORWARD, microbatch)
        if stage + 1 >= self.num_stages:
            return (forward,)
        split = Action(stage + 1, Op.BACKWARD_INPUT, microbatch)
        return (forward, split if split in self.actions else Action(stage + 1, Op.BACKWARD, microbatch))

    def start_times(
        self, duration: Callable[[Action], float] = lambda action: 1, transfer: float = 0.0
    ) -> dict[Action, float]:
        """When each action starts if every rank follows its order and starts each action as early as it can.

        `transfer` is the time from the end of an action until a dependent action of another rank can start.
        Actions that can never start, because orders wait for each other, are left out.
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
        """The number of activations that the rank holds while and after each action of its order runs."""
        live, counts = 0, []
        for action in self.orders[rank]:
            live += action.op is Op.FORWARD and not self.forward_only
            counts.append(live)
            live -= action.op.accumulates
        return counts

    def grid(self, mark: Action | None = None, width: int | None = None) -> str:
        """Draws ranks as rows and time as columns, every action one unit long; a dot is an idle rank.

        `mark` puts an action in brackets. `width` is the most characters in a row: of a longer plan only the part
        around the mark, or else the beginning, is drawn.
        """
        rank = None if mark is None else self.stage_ranks[mark.stage]
        place = None if rank is None or mark is None else (rank, self.orders[rank].index(mark))
        return _draw(self, _columns(self), place, width)

    def to_text(self) -> str:
        """The plan as text that `Plan.parse` reads: a few lines of header, then a line a rank."""
        lines = [
            f"schedule: {self.schedule}",
            f"microbatches: {self.num_microbatches}",
            f"stage ranks: {' '.join(map(str, self.stage_ranks))}",
        ]
        if self.peak_activations is not None:
            lines.append(f"peak activations: {' '.join(map(str, self.peak_activations))}")
        lines += [f"rank {rank}: {' '.join(map(str, order))}".rstrip() for rank, order in enumerate(self.orders)]
        return "\n".join(lines) + "\n"

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Reads what `to_text` writes; blank lines and what follows a `#` are skipped.

        Raises `PlanError` naming the line when the text is malformed. Does not `validate`.
        """
        fields, orders = _parse_lines(text)
        (num_microbatches,) = _integers("microbatches", fields, exactly_one=True)
        peak_activations = _integers("peak activations", fields) if "peak activations" in fields else None
        return cls(fields["schedule"], num_microbatches, _integers("stage ranks", fields), orders, peak_activations)


def _parse_lines(text: str) -> tuple[dict[str, str], tuple[tuple[Action, ...], ...]]:
    fields: dict[str, str] = {}
    orders: list[tuple[Action, ...]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        key, colon, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        if not key and not colon:
            continue
        if key in ("schedule", "microbatches", "stage ranks", "peak activations") and key not in fields and value:
            fields[key] = value
        elif key == f"rank {len(orders)}" and colon:
            try:
                orders.append(tuple(Action.parse(word) for word in value.split()))
            except PlanError as error:
                raise PlanError(f"Line {number} of the plan: {error}") from None
        else:
            raise PlanError(
                "The text of a plan has the lines `schedule: NAME`, `microbatches: COUNT`, `stage ranks: RANK ...` and "
                "perhaps `peak activations: COUNT ...`, each once, and `rank 0: ACTION ...`, `rank 1: ACTION ...` in "
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


def _columns(plan: Plan) -> list[list[int]]:
    """The column of every cell: its time with unit durations; cells that can never run follow in order, last."""
    starts = plan.start_times()
    stuck_from = int(max(starts.values(), default=-1)) + 1
    columns = []
    for order in plan.orders:
        row: list[int] = []
        for action in order:
            row.append(int(starts[action]) if action in starts else max(stuck_from, row[-1] + 1 if row else 0))
        columns.append(row)
    return columns


def _draw(plan: Plan, columns: list[list[int]], place: tuple[int, int] | None, width: int | None) -> str:
    """Draws each rank's cells at the given columns, with the cell at `place` (rank, index in its order) marked."""
    cell = max((len(str(action)) for action in plan.actions), default=1)
    label = len(f"rank {max(plan.num_ranks - 1, 0)}")
    last = max((column for row in columns for column in row), default=-1) + 1
    first, after = _window(last, place and columns[place[0]][place[1]], width and (width - label - 16) // (cell + 2))
    more_before, more_after = ("... " if first else ""), (" ..." if after < last else "")
    lines = []
    for rank, (order, row) in enumerate(zip(plan.orders, columns, strict=True)):
        cells = [f" {'.':<{cell}} "] * last
        for index, (action, column) in enumerate(zip(order, row, strict=True)):
            text = f"{action!s:<{cell}}"
            cells[column] = f"[{text}]" if place == (rank, index) else f" {text} "
        here = "  <-- here" if place is not None and place[0] == rank else ""
        lines.append(f"{f'rank {rank}':<{label}} {more_before}{''.join(cells[first:after])}{more_after}{here}".rstrip())
    return "\n".join(lines) + "\n"


def _window(length: int, centre: int | None, size: int | None) -> tuple[int, int]:
    if size is None or length <= size:
        return 0, length
    size = max(size, 1)
    first = min(max((centre or 0) - size // 2, 0), length - size)
    return first, first + size


def validate(plan: Plan) -> None:
    """Checks a plan before anything is run by it, in time linear in the number of its actions.

    Every action appears once, on the rank of its stage; no rank waits for ever; forwards, and what adds to gradients,
    go in microbatch order within a stage, so that state and sums are the same under every plan; and no rank holds more
    activations than promised. Forward only is a plan too. Raises `PlanError`, a `ValueError`, with the plan drawn.
    """
    _check_sizes(plan)
    _check_cells(plan)
    _check_complete(plan)
    _check_microbatch_order(plan)
    _check_progress(plan)
    _check_peak(plan)


def _error(plan: Plan, message: str, place: tuple[int, int] | None = None, *, timed: bool = False) -> PlanError:
    columns = _columns(plan) if timed else [list(range(len(order))) for order in plan.orders]
    return PlanError(f"{message}\n{_draw(plan, columns, place, MESSAGE_WIDTH)}")


def _cells(plan: Plan) -> Iterator[tuple[tuple[int, int], Action]]:
    for rank, order in enumerate(plan.orders):
        for index, action in enumerate(order):
            yield (rank, index), action


def _check_sizes(plan: Plan) -> None:
    if plan.num_microbatches < 1 or plan.num_stages < 1:
        message = (
            "A plan needs at least one microbatch and one stage. "
            f"Got {plan.num_microbatches} microbatches and {plan.num_stages} stages. Correct the header."
        )
    elif set(plan.stage_ranks) != set(range(plan.num_ranks)):
        message = (
            f"Every stage must be on one of the ranks 0 to {plan.num_ranks - 1}, and every rank hold a stage. "
            f"Got stage ranks {' '.join(map(str, plan.stage_ranks))}. Change `stage ranks`, or add or remove ranks."
        )
    elif plan.peak_activations is not None and len(plan.peak_activations) != plan.num_ranks:
        message = (
            "`peak activations` must have one count for each rank. "
            f"Got {len(plan.peak_activations)} counts for {plan.num_ranks} ranks. Correct or remove it."
        )
    else:
        return
    raise _error(plan, message)


def _check_cells(plan: Plan) -> None:
    seen: dict[Action, int] = {}
    for (rank, index), action in _cells(plan):
        if action.stage not in range(plan.num_stages) or action.microbatch not in range(plan.num_microbatches):
            message = (
                f"Stages go from 0 to {plan.num_stages - 1} and microbatches from 0 to {plan.num_microbatches - 1}. "
                f"Got {action} on rank {rank}. Remove it, or raise the sizes in the header."
            )
        elif plan.stage_ranks[action.stage] != rank:
            holder = plan.stage_ranks[action.stage]
            message = (
                f"An action must be on the rank that holds its stage. Got {action} on rank {rank}, with stage "
                f"{action.stage} on rank {holder}. Move it to rank {holder}, or change `stage ranks`."
            )
        elif action in seen:
            message = (
                f"Every action must appear once. Got {action} again on rank {rank}, as number {index + 1} of its order "
                f"after number {seen[action] + 1}. Remove one of the two."
            )
        else:
            seen[action] = index
            continue
        raise _error(plan, message, (rank, index))


def _check_complete(plan: Plan) -> None:
    for stage, microbatch in product(range(plan.num_stages), range(plan.num_microbatches)):
        present = [action for op in Op if (action := Action(stage, op, microbatch)) in plan.actions]
        ops = "".join(action.op for action in present)
        if ops in ("FB", "FIW") or (ops == "F" and plan.forward_only):
            continue
        rank = plan.stage_ranks[stage]
        raise _error(
            plan,
            "Every stage needs, for each microbatch, an F and either a B or both an I and a W; or, in a plan of "
            f"forwards alone, an F. Got {' '.join(map(str, present)) or 'nothing'} for stage {stage} and microbatch "
            f"{microbatch}. Complete it on rank {rank}.",
            (rank, plan.orders[rank].index(present[-1])) if present else None,
        )


def _check_microbatch_order(plan: Plan) -> None:
    for kind, ops in (("forwards", (Op.FORWARD,)), ("gradients (B or W)", (Op.BACKWARD, Op.BACKWARD_WEIGHT))):
        latest: dict[int, Action] = {}
        for place, action in _cells(plan):
            if action.op not in ops:
                continue
            before = latest.get(action.stage)
            if before is not None and before.microbatch > action.microbatch:
                message = (
                    f"The {kind} of a stage must go in the order of the microbatches, so that state and sums of "
                    f"gradients do not depend on the schedule. Got {action} after {before} on rank {place[0]}. "
                    "Exchange the two."
                )
                raise _error(plan, message, place)
            latest[action.stage] = action


def _check_progress(plan: Plan) -> None:
    started = plan.start_times()
    if len(started) == len(plan.actions):
        return
    heads = {
        rank: next(action for action in order if action not in started)
        for rank, order in enumerate(plan.orders)
        if any(action not in started for action in order)
    }
    needs = {rank: next(n for n in plan.dependencies(head) if n not in started) for rank, head in heads.items()}
    circle = [min(heads)]
    while circle.count(circle[-1]) < 2:
        circle.append(plan.stage_ranks[needs[circle[-1]].stage])
    circle = circle[circle.index(circle[-1]) :]
    links = []
    for rank, holder in pairwise(circle):
        behind = f", which comes after {heads[holder]}" if needs[rank] != heads[holder] else ""
        links.append(f"{heads[rank]} on rank {rank} waits for {needs[rank]} on rank {holder}{behind}")
    raise _error(
        plan,
        f"No rank may wait for ever. Got a circle: {'; '.join(links)}. "
        "Move an action so that each comes after what it waits for.",
        (circle[0], plan.orders[circle[0]].index(heads[circle[0]])),
        timed=True,
    )


def _check_peak(plan: Plan) -> None:
    for rank, limit in enumerate(plan.peak_activations or ()):
        for index, live in enumerate(plan.live_activations(rank)):
            if live > limit:
                message = (
                    f"Rank {rank} must not hold more activations at once than the {limit} of `peak activations`. "
                    f"Got {live} in {plan.orders[rank][index]}. Move a backward before it, or raise that number."
                )
                raise _error(plan, message, (rank, index), timed=True)
