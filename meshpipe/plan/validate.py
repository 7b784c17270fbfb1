"""Checks the rules that a plan must obey before anything runs; a violation is drawn."""

from collections.abc import Iterator
from itertools import pairwise, product

from meshpipe.plan.grid import draw, time_columns
from meshpipe.plan.plan import Action, Op, Plan, PlanError

MESSAGE_WIDTH = 110
"""The most characters in a row of a grid in an error message; of a longer plan, the part around the marked cell."""


def validate(plan: Plan) -> None:
    """Checks a plan before anything runs, in time linear in the number of its actions.

    Every action appears once, on the rank of its stage. No rank waits for ever. Within a stage, forwards go in
    microbatch order, and so do the actions that accumulate gradients; so state and gradients are the same under every
    plan. No rank holds more activations than promised. A plan of forwards alone is valid too. Raises `PlanError`, a
    `ValueError`, with the plan drawn.
    """
    _check_sizes(plan)
    _check_cells(plan)
    _check_complete(plan)
    _check_microbatch_order(plan)
    _check_progress(plan)
    _check_peak(plan)


def _error(plan: Plan, message: str, place: tuple[int, int] | None = None, *, timed: bool = False) -> PlanError:
    columns = [list(range(len(order))) for order in plan.orders]
    if timed:
        columns = time_columns(plan.orders, plan.start_times())
    return PlanError(f"{message}\n{draw(plan.orders, columns, place, MESSAGE_WIDTH)}")


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
    elif plan.graph.num_stages != plan.num_stages:
        message = (
            "The graph of a plan must have its stages. "
            f"Got {plan.graph.num_stages} stages in the graph of a plan of {plan.num_stages}. Make it for this plan."
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
        if ops in ("FB", "FIW") if plan.has_backward(stage) else ops == "F":
            continue
        rank = plan.stage_ranks[stage]
        if not plan.graph.has_backward(stage):
            raise _error(
                plan,
                "A stage that is not trained, and reads nothing of one that is, has only an F for each microbatch. Got "
                f"{' '.join(map(str, present)) or 'nothing'} for stage {stage} and microbatch {microbatch}. Correct it "
                f"on rank {rank}.",
                (rank, plan.orders[rank].index(present[-1])) if present else None,
            )
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
            if action.op not in ops or not (action.op is Op.FORWARD or plan.graph.trains[action.stage]):
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
