"""Text in columns that fits a terminal without ever breaking a name or a number."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

GAPS = (3, 2, 1)
"""Spaces between columns: as many of these as there is room for."""

INDENT = 4
"""Of a row without cells."""


@dataclass(frozen=True)
class Column:
    """A column. Its header may always be broken between words; its cells only if it `wraps`."""

    name: str
    is_right: bool = False
    wraps: bool = False


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, ...]
    rest: str
    """What follows the cells, across all further columns."""
    style: str


@dataclass
class Columns:
    """A table of text, for `Console.print`: readable in a file, and no wider than the terminal where that is possible.

    Where there is little room, columns move together, headers and columns that wrap take more lines, and at last the
    table comes in parts below each other, of which each repeats the first columns, which name its rows.
    """

    columns: Sequence[Column]
    keys: int = 1
    """How many columns name a row."""
    _rows: list[_Row] = field(default_factory=list)

    def add_row(self, *cells: object, rest: str = "", style: str = "") -> None:
        """Adds a row. `rest` stands across the columns that have no cell; cells before it do not wrap. Without any,
        it is indented.
        """
        assert len(cells) <= len(self.columns)
        self._rows.append(_Row(tuple(str(cell) for cell in cells), rest, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for number, places in enumerate(self._parts(options.max_width)):
            if number > 0:
                yield Text()
            yield from self._part(places, options.max_width)

    def _parts(self, width: int) -> Iterator[list[int]]:
        """The columns of each part: as many as fit beside those that name a row."""
        places = [*range(self.keys)]
        for place in range(self.keys, len(self.columns)):
            least = sum(self._least(p) for p in (*places, place)) + len(places) * GAPS[-1]
            if len(places) > self.keys and least > width:
                yield places
                places = [*range(self.keys)]
            places.append(place)
        yield places

    def _part(self, places: Sequence[int], width: int) -> Iterator[Text]:
        widths, gap = self._widths(places, width)
        headers = [_broken(self.columns[p].name, size) for p, size in zip(places, widths, strict=True)]
        yield from self._lines(places, headers, widths, gap, "bold")
        for row in self._rows:
            shown = [p for p in places if p < len(row.cells)]
            cells = [
                _broken(row.cells[p], size) if self.columns[p].wraps and not row.rest else [row.cells[p]]
                for p, size in zip(shown, widths[: len(shown)], strict=True)
            ]
            if not row.rest:
                yield from self._lines(shown, cells, widths, gap, row.style)
            elif places[-1] >= len(row.cells):  # in the part where its columns would be
                indent = sum(widths[: len(shown)]) + gap * len(shown) if shown else INDENT
                lines = _broken(row.rest, max(width - indent, 20))
                (first,) = self._lines(shown, cells, widths, gap, row.style)
                yield Text(first.plain.ljust(indent) + lines[0], row.style)
                yield from (Text(" " * indent + line, row.style) for line in lines[1:])

    def _widths(self, places: Sequence[int], width: int) -> tuple[list[int], int]:
        """The width of each column, and the gap between them."""
        full = [self._full(p) for p in places]
        for gap in GAPS:
            if sum(full) + gap * (len(places) - 1) <= width:
                return full, gap
        least = [self._least(p) for p in places]
        gap = next((g for g in GAPS if sum(least) + g * (len(places) - 1) <= width), GAPS[-1])
        spare = max(0, width - sum(least) - gap * (len(places) - 1))
        # Columns that wrap need room most: they take what is left in equal shares, then the headers.
        for wraps in (True, False):
            wanting = [i for i, p in enumerate(places) if self.columns[p].wraps is wraps and least[i] < full[i]]
            while spare > 0 and wanting:
                for i in wanting[:spare]:
                    least[i], spare = least[i] + 1, spare - 1
                wanting = [i for i in wanting if least[i] < full[i]]
        return least, gap

    def _full(self, place: int) -> int:
        """The width in which nothing is broken."""
        return max(map(cell_len, (self.columns[place].name, *self._cells(place))))

    def _least(self, place: int) -> int:
        """The width in which no word of the header, and no cell or no word of a cell, is broken."""
        column = self.columns[place]
        cells = [word for cell in self._cells(place) for word in (cell.split() if column.wraps else [cell])]
        return max(map(cell_len, (*column.name.split(), *cells)), default=0)

    def _cells(self, place: int) -> Iterator[str]:
        return (row.cells[place] for row in self._rows if place < len(row.cells))

    def _lines(
        self, places: Sequence[int], cells: Sequence[Sequence[str]], widths: Sequence[int], gap: int, style: str
    ) -> Iterator[Text]:
        for line in range(max(map(len, cells), default=1)):
            texts = [cell[line] if line < len(cell) else "" for cell in cells]
            padded = []
            for text, size, place in zip(texts, widths[: len(texts)], places, strict=True):
                blank = " " * (size - cell_len(text))
                padded.append(blank + text if self.columns[place].is_right else text + blank)
            yield Text((" " * gap).join(padded).rstrip(), style)


def _broken(text: str, width: int) -> list[str]:
    """The text in lines of at most this width, broken between words; a longer word stays whole."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and cell_len(joined) > width:
            lines.append(word)
        else:
            lines[-1] = joined
    return lines
