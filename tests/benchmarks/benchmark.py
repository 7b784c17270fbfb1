"""What the benchmarks share: medians, and a table and a line of JSON of their rows."""

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

PATIENCE = 10
"""Rounds that a benchmark takes at most for each that is to count, where it leaves out those that others disturb."""


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def times_of(call: Callable[[], object], repeats: int, warmups: int = 1) -> list[float]:
    """Seconds of each of some calls, each of which waits for its result."""
    for _ in range(warmups):
        call()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def busy_seconds() -> float:
    """Time of all processors since the machine was started, whoever used it."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, file.read_text().splitlines()[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def print_results(title: str, rows: list[dict[str, object]], json_file: str | None = None) -> None:
    """A table of the rows, then `{"benchmark": title, "rows": [...]}` in one line, which also goes into the file."""
    table = Table(title=title, box=None, pad_edge=False, padding=(0, 3, 0, 0), title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(table)
    line = json.dumps({"benchmark": title, "rows": rows})
    print(line)
    if json_file is not None:
        Path(json_file).write_text(line + "\n")
