"""Draws timelines: one row per rank, time to the right, and below them the memory of each rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshpipe.files import check_file, writing_whole
from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.simulate import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    Op.FORWARD: "#8fb8de",
    Op.BACKWARD: "#f2b880",
    Op.BACKWARD_INPUT: "#ecaaa5",
    Op.BACKWARD_WEIGHT: "#a8cf9a",
}
"""Of the first stage of a rank; its further stages are lighter."""
LIGHTEST = 0.7
"""The share of white in the colour of a rank's last stage, where it has many."""

WIDEST = 60.0
"""Inches. Where labels would need more, there are none, and the picture is as narrow as `WIDEST_UNLABELLED`."""
WIDEST_UNLABELLED = 24.0
BESIDE = 3.0
"""Inches that names of ranks and legends take."""
LARGEST_FONT, SMALLEST_FONT = 7.0, 5.0
DIGIT = 0.0095
"""Inches that a digit takes for each point of its font's size."""
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
    width = BESIDE + max(0.22 * columns, *map(_width_of_labels, panels))
    labelled = width <= WIDEST
    width = width if labelled else min(WIDEST_UNLABELLED, BESIDE + 0.22 * columns)
    figure = Figure(figsize=(width, 1.0 + sum(heights)), layout="constrained")
    axes = iter(figure.subplots(len(heights), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0])
    for panel in panels:
        longest = max(p.timeline.makespan for p in panels if p.in_seconds == panel.in_seconds)
        rows = next(axes)
        _draw_ranks(rows, panel, longest, (width - BESIDE) / longest if labelled else 0.0)
        if panel.timeline.memory:
            _draw_memory(next(axes), panel, longest)
    used = {action.op for panel in panels for action in panel.timeline.starts}
    most = max(_stages_per_rank(panel.timeline) for panel in panels)
    patches = [Patch(color=COLOURS[op], label=f"{op} {op.meaning}") for op in Op if op in used]
    patches += [
        Patch(color=_shade("#808080", stage, most), label=f"stage {stage + 1} of a rank")
        for stage in range(most)
        if most > 1
    ]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False, fontsize=8)
    with writing_whole("plot", file) as partial:
        figure.savefig(partial, dpi=150)


MAX_NAMED = 8
"""The most ranks, about, that a legend names."""


def _heights(timeline: Timeline) -> list[float]:
    """Heights in inches of the rows of ranks, and of the memory curve."""
    rows = 0.7 + 0.42 * timeline.plan.num_ranks
    return [rows, 1.6] if timeline.memory else [rows]


def _columns(timeline: Timeline) -> float:
    """The length of the timeline in actions of a usual length."""
    durations = sorted(timeline.ends[action] - start for action, start in timeline.starts.items())
    usual = durations[len(durations) // 2] or timeline.makespan / len(durations)
    return timeline.makespan / usual if usual else 1.0


def _width_of_labels(panel: Panel) -> float:
    """Inches in which nearly all actions have room for the number of their microbatch, in the smallest font."""
    timeline = panel.timeline
    digits = len(str(timeline.plan.num_microbatches - 1))
    durations = sorted(timeline.ends[action] - start for action, start in timeline.starts.items())
    short = durations[len(durations) // 10]
    return timeline.makespan / short * (digits + 0.6) * DIGIT * SMALLEST_FONT if short else 0.0


def _stages_per_rank(timeline: Timeline) -> int:
    return max(len(timeline.plan.stages_of(rank)) for rank in range(timeline.plan.num_ranks))


def _shade(colour: str, stage: int, count: int) -> tuple[float, float, float]:
    """The colour of a rank's stage, by its place among the rank's stages."""
    from matplotlib.colors import to_rgb

    white = LIGHTEST * stage / max(count - 1, 2)
    red, green, blue = (part + (1 - part) * white for part in to_rgb(colour))
    return red, green, blue


def _draw_ranks(axes: "Axes", panel: Panel, longest: float, inches: float) -> None:
    """Rows of ranks, whose actions have the number of their microbatch as far as there is room.

    `inches` is the length of one unit of time; 0 labels nothing.
    """
    timeline, plan = panel.timeline, panel.timeline.plan
    count, edge = _stages_per_rank(timeline), 0.7 if inches else 0.2
    for action, start in timeline.starts.items():
        rank, width = plan.stage_ranks[action.stage], timeline.ends[action] - start
        colour = _shade(COLOURS[action.op], plan.stages_of(rank).index(action.stage), count)
        axes.barh(rank, width, left=start, height=0.9, color=colour, edgecolor="white", linewidth=edge)
        label = str(action.microbatch)
        size = min(LARGEST_FONT, width * inches / ((len(label) + 0.5) * DIGIT))
        if size >= SMALLEST_FONT - 0.1:
            axes.text(start + width / 2, rank, label, ha="center", va="center", fontsize=size)
    axes.set_yticks(range(plan.num_ranks), [_label(plan, rank) for rank in range(plan.num_ranks)])
    axes.invert_yaxis()
    axes.set_title(f"{panel.title}: bubble {timeline.bubble_fraction:.1%}", fontsize=10)
    _draw_time(axes, panel, longest)


def _label(plan: Plan, rank: int) -> str:
    """The name of a rank, and those of its stages that run no backward where others do."""
    stages = plan.stages_of(rank)
    without = [stage for stage in stages if not plan.graph.has_backward(stage)]
    if plan.forward_only or not without:
        return f"rank {rank}"
    which = "" if len(without) == len(stages) else f" of stage {', '.join(map(str, without))}"
    return f"rank {rank}\nno backward{which}"


def _draw_memory(axes: "Axes", panel: Panel, longest: float) -> None:
    from matplotlib import colormaps

    timeline = panel.timeline
    curves = [timeline.memory_curve(rank) for rank in range(timeline.plan.num_ranks)]
    size, unit = unit_of_bytes(max(held for curve in curves for _, held in curve))
    for rank, curve in enumerate(curves):
        times, held = zip(*curve, (timeline.makespan, curve[-1][1]), strict=True)
        sizes = [bytes_held / size for bytes_held in held]
        # Of many ranks, neighbours have similar colours, and some stand for all in the legend.
        colour = None if len(curves) <= MAX_NAMED else colormaps["viridis"](rank / (len(curves) - 1))
        is_named = rank % -(-len(curves) // MAX_NAMED) == 0 or rank == len(curves) - 1
        axes.step(times, sizes, where="post", label=f"rank {rank}" if is_named else None, linewidth=1, color=colour)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{unit} on a device", fontsize=8)
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


def unit_of_bytes(most: float) -> tuple[float, str]:
    """The unit in which so many bytes are a handy number: its size, and its name."""
    return next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if most >= size), (1.0, "B"))
