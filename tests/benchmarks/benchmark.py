"""What the benchmarks share: medians, and results as a table and as one line of JSON."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def print_results(title: str, rows: list[dict[str, object]], json_file: str | None) -> None:
    """A table of the rows, then a line of JSON, which also goes to the file if one is given."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in columns))
    Console().print(table)
    line = json.dumps({"benchmark": title, "rows": rows})
    print(line)
    if json_file is not None:
        Path(json_file).write_text(line + "\n")


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
