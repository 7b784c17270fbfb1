"""A table that compares runs."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path

from meshpipe.report.columns import Columns
from meshpipe.report.past_run import PastRun
from meshpipe.report.tables import make_table

GAP = 2
"""Characters between columns."""
DISPENSABLE = ("time", "utilisation", "best held out", "best")
"""Columns that are left out, in this order, where the table would be wider than the terminal."""


def run_table(runs: Sequence[PastRun], width: int) -> Columns:
    """Each run's status, steps, losses and throughput, in as many columns as fit into `width` characters, and what its
    layers and metrics report by names of their own. Columns that no run has are left out.
    """
    units = {run.unit for run in runs}
    columns: Mapping[str, Callable[[PastRun], str]] = {
        "run": lambda run: run.name,
        "status": lambda run: run.status,
        "steps": _steps,
        "loss": lambda run: _loss(_last(run.values("loss"))),
        "best": lambda run: _loss(min(run.values("loss").values(), default=None)),
        "held out": lambda run: _loss(_last(run.held_out())),
        "best held out": lambda run: _loss(min(run.held_out().values(), default=None)),
        **{name: partial(_own, name) for name in sorted({name for run in runs for name in run.own_names(run.steps)})},
        **{
            f"held out {name}": partial(_own_held_out, name)
            for name in sorted({name for run in runs for name in run.own_names(run.evaluations)})
        },
        f"{'/s, '.join(sorted(units))}/s": lambda run: "" if run.throughput is None else f"{run.throughput:,.0f}",
        "utilisation": lambda run: _percent(_last(run.values("model_flops_utilisation"))),
        "time": lambda run: str(timedelta(seconds=round(run.seconds))),
    }
    cells = {name: [cell(run) for run in runs] for name, cell in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    for name in DISPENSABLE:
        if sum(max(map(len, (name, *column))) + GAP for name, column in cells.items()) - GAP > width:
            cells.pop(name, None)
    table = make_table(*cells, right=set(cells) - {"run", "status"})
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return table


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many parts as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(map(str, paths))


def _steps(run: PastRun) -> str:
    done = max(run.steps, default=max(run.evaluations, default=0))
    return f"{done:,}" if run.planned_steps is None else f"{done:,}/{run.planned_steps:,}"


def _own(name: str, run: PastRun) -> str:
    return _number(_last(run.values(name)))


def _own_held_out(name: str, run: PastRun) -> str:
    return _number(_last(run.held_out(name)))


def _last(values: Mapping[int, float]) -> float | None:
    return values[max(values)] if values else None


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
