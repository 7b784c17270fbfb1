"""Draws what the devices of each rank hold at the peak of a step, as stacked bars against the memory that there is."""

from collections.abc import Sequence
from pathlib import Path

from meshpipe.choose.memory import RankMemory
from meshpipe.files import writing_whole
from meshpipe.machine import format_bytes
from meshpipe.report.picture import unit_of_bytes

COLOURS = ("#4c78a8", "#72b7b2", "#54a24b", "#bab0ac", "#f58518", "#eeca3b", "#e45756")
"""Of the parts of `RankMemory.parts`, in order."""
NARROWEST, WIDEST = 7.0, 20.0
"""Inches."""
SMALL = 0.1
"""Share of a device's memory below which it is not drawn to scale."""


def draw_memory(ranks: Sequence[RankMemory], limit: int, title: str, file: Path) -> None:
    """Draws one bar per rank, from parameters at the bottom to temporaries at the top; `limit`, the bytes
    of a device, is a line unless they use little of it.

    Call `check_picture` first.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(WIDEST, max(NARROWEST, 5.0 + 0.5 * len(ranks))), 4.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(ranks))
    size, unit = unit_of_bytes(float(max(rank.total for rank in ranks)))
    bottom = [0.0] * len(ranks)
    for name, colour in zip(ranks[0].parts, COLOURS, strict=True):
        heights = [rank.parts[name] / size for rank in ranks]
        axes.bar(places, heights, 0.7, bottom, color=colour, label=name)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    for place, height in zip(places, bottom, strict=True):
        axes.text(place, height, f"{height:.3g}", ha="center", va="bottom", fontsize=8)
    there = f"a device has {format_bytes(limit)}"
    if max(bottom) >= SMALL * limit / size:
        axes.axhline(limit / size, color="black", linestyle="--", linewidth=1)
        axes.text(len(ranks) - 0.5, limit / size, there, ha="right", va="bottom", fontsize=8)
        bottom.append(limit / size)
    else:
        title = f"{title} ({there})"
    axes.set_ylim(0, 1.12 * max(bottom))
    axes.set_xlim(-0.6, len(ranks) - 0.4)
    axes.set_xticks(places, [f"rank {rank.rank}" for rank in ranks], rotation=90 if len(ranks) > 16 else 0)
    axes.set_ylabel(f"{unit} on each device, at the peak of a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_title(title, fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=8)
    with writing_whole("plot", file) as partial:
        figure.savefig(partial, dpi=150)
