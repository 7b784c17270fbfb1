"""Draws the orders of ranks as text: one row per rank, one column per unit of time."""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

Cell = TypeVar("Cell")
"""Anything that prints as the text of a cell, such as an action."""


def time_columns(orders: Sequence[Sequence[Cell]], starts: Mapping[Cell, float]) -> list[list[int]]:
    """The column of every cell: its start in whole units. Cells that never start come after all that do."""
    stuck_from = int(max(starts.values(), default=-1)) + 1
    columns = []
    for order in orders:
        row: list[int] = []
        for action in order:
            row.append(int(starts[action]) if action in starts else max(stuck_from, row[-1] + 1 if row else 0))
        columns.append(row)
    return columns


def draw(
    orders: Sequence[Sequence[object]],
    columns: Sequence[Sequence[int]],
    place: tuple[int, int] | None = None,
    width: int | None = None,
) -> str:
    """Draws the cells of each rank at the given columns, with dots between them.

    `place` is a rank and an index in its order: that cell is put in brackets. `width` is the most characters in a row:
    of longer rows, only the part around the place is drawn, or else the beginning.
    """
    cell, label, last = _sizes(orders, columns)
    around = place and columns[place[0]][place[1]]
    window = _window(last, around, width and (width - label - _MARKS) // (cell + 2))
    return _draw(orders, columns, window, place)


def draw_pages(orders: Sequence[Sequence[object]], columns: Sequence[Sequence[int]], width: int) -> Iterator[str]:
    """All that `draw` draws, in parts of at most this width."""
    cell, label, last = _sizes(orders, columns)
    size = max(1, (width - label - len(" ...  ...")) // (cell + 2))
    if label + 1 + last * (cell + 2) <= width:
        size = max(1, last)
    for first in range(0, max(1, last), size):
        yield _draw(orders, columns, (first, min(first + size, last)), None)


_MARKS = 16
"""Characters of a row besides its label and cells, where a part of it is drawn around a place."""


def _sizes(orders: Sequence[Sequence[object]], columns: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    """The width of a cell and of a rank's label, and the number of columns."""
    cell = max((len(str(action)) for order in orders for action in order), default=1)
    label = len(f"rank {max(len(orders) - 1, 0)}")
    return cell, label, max((column for row in columns for column in row), default=-1) + 1


def _draw(
    orders: Sequence[Sequence[object]],
    columns: Sequence[Sequence[int]],
    window: tuple[int, int],
    place: tuple[int, int] | None,
) -> str:
    (cell, label, last), (first, after) = _sizes(orders, columns), window
    more_before, more_after = ("... " if first else ""), (" ..." if after < last else "")
    lines = []
    for rank, (order, row) in enumerate(zip(orders, columns, strict=True)):
        cells = [f" {'.':<{cell}} "] * last
        for index, (action, column) in enumerate(zip(order, row, strict=True)):
            text = f"{action!s:<{cell}}"
            cells[column] = f"[{text}]" if place == (rank, index) else f" {text} "
        here = "  <-- here" if place is not None and place[0] == rank else ""
        lines.append(f"{f'rank {rank}':<{label}} {more_before}{''.join(cells[first:after])}{more_after}{here}".rstrip())
    return "\n".join(lines) + "\n"


def draw_html(caption: str, orders: Sequence[Sequence[object]], columns: Sequence[Sequence[int]]) -> str:
    """The grid as an HTML table, which scrolls sideways where it is wide."""
    last = max((column for row in columns for column in row), default=-1) + 1
    lines = [f"<div style='overflow-x: auto'><table><caption>{html.escape(caption)}</caption>"]
    for rank, (order, row) in enumerate(zip(orders, columns, strict=True)):
        texts = dict(zip(row, map(str, order), strict=True))
        cells = "".join(f"<td>{html.escape(texts.get(column, ''))}</td>" for column in range(last))
        lines.append(f"<tr><th>rank {rank}</th>{cells}</tr>")
    return "\n".join([*lines, "</table></div>"])


def _window(length: int, centre: int | None, size: int | None) -> tuple[int, int]:
    if size is None or length <= size:
        return 0, length
    size = max(size, 1)
    first = min(max((centre or 0) - size // 2, 0), length - size)
    return first, first + size
