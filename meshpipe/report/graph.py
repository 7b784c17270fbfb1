"""What a plan shows of the graph of its stages: what each runs, and what moves between them."""

from collections.abc import Hashable, Iterator, Sequence

from meshpipe.plan.graph import Graph, Value
from meshpipe.plan.lower import LoweredPlan
from meshpipe.plan.plan import Plan
from meshpipe.plan.simulate import StageMemory
from meshpipe.plan.traffic import traffic
from meshpipe.report.columns import Columns
from meshpipe.report.tables import format_bytes, make_table

MOVES = "What stages read of each other, with its bytes on each device of a rank, for one microbatch and for a step:"


def what_stages_run(graph: Graph) -> list[str]:
    """For each stage; empty where all are trained."""
    if all(graph.trains):
        return []
    kinds = {
        (False, False): "forward alone",
        (False, True): "forward, backward of its inputs",
        (True, True): "forward, backward",
    }
    return [kinds[trained, graph.has_backward(stage)] for stage, trained in enumerate(graph.trains)]


def forward_only_line(graph: Graph) -> Iterator[str]:
    """Says which stages run no backward, if there are any."""
    found = [stage for stage in range(graph.num_stages) if not graph.has_backward(stage)]
    if found:
        runs = "runs" if len(found) == 1 else "run"
        yield f"{list_stages(found).capitalize()} {runs} no backward: nothing is trained there or before."


def traffic_table(lowered: LoweredPlan, memory: Sequence[StageMemory], late: frozenset[str]) -> Columns:
    """One row per value: between which stages, its size, what moves of it in a step, and where it waits.

    Values without a name, which go to the next stage, share a row where all else is the same.
    """
    names = ("value", "made by", "read by", "size", "moves", "gradients back", "per step", "waits")
    table = make_table(*names, right=("size", "moves", "gradients back", "per step"), wrap=("made by", "read by"))
    plan, moved = lowered.plan, traffic(lowered, memory)
    rows: dict[Hashable, list[Value]] = {}
    for value, found in moved.items():
        rows.setdefault((value.name, _size(plan, value, memory), found), []).append(value)
    for values in rows.values():
        first, found = values[0], moved[values[0]]
        table.add_row(
            first.name or "output",
            _with_ranks(plan, [value.source for value in values]),
            _with_ranks(plan, first.targets) if len(values) == 1 else "the next stage",
            format_bytes(_size(plan, first, memory)),
            _times(found.moves // plan.num_microbatches),
            _times(found.moves_back // plan.num_microbatches),
            format_bytes(sum(moved[value].total for value in values)),
            _where(first, moves=found.moves > 0, late=late),
        )
    if len(rows) > 1:
        table.add_row(
            "all", "", "", "", "", "", format_bytes(sum(found.total for found in moved.values())), "", style="bold"
        )
    return table


def _size(plan: Plan, value: Value, memory: Sequence[StageMemory]) -> int | float:
    reader = value.targets[0]
    return memory[reader].inputs[plan.graph.inputs(reader).index(value)]


def _where(value: Value, *, moves: bool, late: frozenset[str]) -> str:
    if not moves:
        return "on its rank"
    return "where it is made" if value.name in late else "where it is read"


def _times(count: int) -> str:
    """Of a value for each microbatch."""
    return f"{count} x" if count else "none"


def _with_ranks(plan: Plan, stages: Sequence[int]) -> str:
    ranks = sorted({plan.stage_ranks[stage] for stage in stages})
    return f"{list_stages(stages)} ({'rank' if len(ranks) == 1 else 'ranks'} {_runs(ranks)})"


def list_stages(stages: Sequence[int]) -> str:
    """`stage 3`, or `stages 0-2, 5`."""
    return f"{'stage' if len(stages) == 1 else 'stages'} {_runs(stages)}"


def _runs(numbers: Sequence[int]) -> str:
    """Ascending numbers, neighbours as a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
