"""What all tables and printed lines are made with."""

from collections.abc import Iterable

from rich.console import Console

from meshpipe.machine import format_bytes as format_bytes
from meshpipe.report.columns import Column, Columns

PLAIN_WIDTH = 240
"""Width in characters where the output is not a terminal, so that no row is wrapped in a file or a pipe."""
_UNITS = ("s", 1.0), ("ms", 1e-3), ("us", 1e-6)
ROUNDS_UP = 0.9995
"""This share of a unit is 1 to three digits."""


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console for standard output, standard error or nothing: as wide as the terminal, where lines end between
    words, or wide enough for any table.
    """
    console = Console(stderr=stderr, highlight=False, quiet=quiet)
    if console.is_terminal:
        return console
    return Console(stderr=stderr, highlight=False, soft_wrap=True, quiet=quiet, width=PLAIN_WIDTH)


def make_table(*columns: str, right: Iterable[str] = (), wrap: Iterable[str] = (), keys: int = 1) -> Columns:
    """An empty table; columns in `right` are numbers, those in `wrap` may be broken between words, and the first `keys`
    name a row.
    """
    right, wrap = set(right), set(wrap)
    return Columns([Column(name, is_right=name in right, wraps=name in wrap) for name in columns], keys)


def print_text(console: Console, text: str) -> None:
    """Prints sentences; on a terminal, in lines that end between words."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


def format_seconds(seconds: float) -> str:
    """A time to three significant digits: `1.5 ms`; shorter ones than a tenth of a microsecond are only called so."""
    if seconds >= 999.5:
        return f"{seconds:,.0f} s"
    if 0 < seconds < 1e-7:
        return "< 0.1 us"
    unit, size = next(((unit, size) for unit, size in _UNITS if seconds >= ROUNDS_UP * size), ("us", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def describe_layers(layers: range) -> str:
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start}-{layers.stop - 1}"


def count_of(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
