"""Draws timelines: one row per rank, time to the right, and below them the memory of each rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshpipe.files import check_file
from meshpipe.plan.plan import Op
from meshpipe.plan.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    Op.FORWARD: "#8fb8de",
    Op.BACKWARD: "#f2b880",
    Op.BACKWARD_INPUT: "#f2b880",
    Op.BACKWARD_WEIGHT: "#a8cf9a",
}
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}
FORWARDS = "forwards of all layers of a rank"


@dataclass(frozen=True)
class Panel:
    """One timeline of a picture."""

    timeline: Timeline
    title: str
    in_seconds: bool = False
    """Whether its times are in seconds; else they are in forwards of all layers of a rank."""


def check_picture(file: Path, flag: str = "--plot") -> None:
    """Raises `ValueError` when a picture cannot be written to that file."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in formats:
        raise ValueError(
            f"{flag} must name a file whose suffix is one of {', '.join(sorted(formats))}. Got {str(file)!r}."
        )
    check_file(flag.removeprefix("--"), file)


def draw_timelines(panels: Sequence[Panel], file: Path) -> None:
    """Draws timelines below each other, each with its memory if that is known; call `check_picture` first.

    Panels with the same unit share their time axis, so lengths can be compared.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heights = [height for panel in panels for height in _heights(panel.timeline)]
    columns = max(_columns(panel.timeline) for panel in panels)
    figure = Figure(figsize=(min(24.0, 3 + 0.22 * columns), 1.0 + sum(heights)), layout="constrained")
    axes = iter(figure.subplots(len(heights), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0])
    for panel in panels:
        longest = max(p.timeline.makespan for p in panels if p.in_seconds == panel.in_seconds)
        rows = next(axes)
        _draw_ranks(rows, panel, longest, figure.get_figwidth() / longest)
        if panel.timeline.memory:
            _draw_memory(next(axes), panel, longest)
    used = {action.op for panel in panels for action in panel.timeline.starts}
    patches = [Patch(color=COLOURS[op], label=f"{op} {op.meaning}") for op in Op if op in used]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)


def _heights(timeline: Timeline) -> list[float]:
    """Heights in inches of the rows of ranks, and of the memory curve."""
    rows = 0.7 + 0.42 * timeline.plan.num_ranks
    return [rows, 1.6] if timeline.memory else [rows]


def _columns(timeline: Timeline) -> float:
    """The length of the timeline in actions of a usual length."""
    durations = sorted(timeline.ends[action] - start for action, start in timeline.starts.items())
    usual = durations[len(durations) // 2] or timeline.makespan / len(durations)
    return timeline.makespan / usual if usual else 1.0


def _draw_ranks(axes: "Axes", panel: Panel, longest: float, inches: float) -> None:
    timeline, plan = panel.timeline, panel.timeline.plan
    for action, start in timeline.starts.items():
        rank, width = plan.stage_ranks[action.stage], timeline.ends[action] - start
        axes.barh(rank, width, left=start, height=0.9, color=COLOURS[action.op], edgecolor="white", linewidth=0.7)
        label = str(action) if plan.num_stages > plan.num_ranks else str(action.microbatch)
        if width * inches > 0.075 * len(label):
            axes.text(start + width / 2, rank, label, ha="center", va="center", fontsize=7)
    axes.set_yticks(range(plan.num_ranks), [f"rank {rank}" for rank in range(plan.num_ranks)])
    axes.invert_yaxis()
    axes.set_title(f"{panel.title}: bubble {timeline.bubble_fraction:.1%}", fontsize=10)
    _draw_time(axes, panel, longest)


def _draw_memory(axes: "Axes", panel: Panel, longest: float) -> None:
    timeline = panel.timeline
    curves = [timeline.memory_curve(rank) for rank in range(timeline.plan.num_ranks)]
    size, unit = _unit_of_bytes(max(held for curve in curves for _, held in curve))
    for rank, curve in enumerate(curves):
        times, held = zip(*curve, (timeline.makespan, curve[-1][1]), strict=True)
        axes.step(times, [bytes_held / size for bytes_held in held], where="post", label=f"rank {rank}", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{unit} on a device", fontsize=8)
    if len(curves) <= 8:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _draw_time(axes, panel, longest)


def _draw_time(axes: "Axes", panel: Panel, longest: float) -> None:
    axes.set_xlim(0, longest)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(labelsize=8)
    if not panel.in_seconds:
        axes.set_xlabel(f"time, in {FORWARDS}", fontsize=8)
        return
    unit = next((unit for unit, scale in UNITS.items() if longest * scale >= 1), "us")
    ticks: Any = axes.xaxis.get_major_locator().tick_values(0, longest)
    shown = [tick for tick in ticks if 0 <= tick <= longest]
    axes.set_xticks(shown, [f"{tick * UNITS[unit]:.3g}" for tick in shown])
    axes.set_xlabel(f"time, {unit}", fontsize=8)


def _unit_of_bytes(most: float) -> tuple[float, str]:
    return next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= size), (1.0, "B"))
