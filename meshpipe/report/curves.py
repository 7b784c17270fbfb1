"""Draws the curves of runs: loss, norm of the gradient, and throughput."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meshpipe.files import writing_whole
from meshpipe.report.past_run import PastRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_MARKERS = 60
"""Above this many evaluations, they are drawn without markers."""


def draw_curves(runs: Sequence[PastRun], file: Path, smooth: float = 0.0) -> None:
    """One colour a run; held-out losses are dashed. Call `check_picture` first.

    With `smooth`, a running mean in which each step keeps so much of the mean before is drawn over the faint values.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    loss, norm, speed = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1.2, 1.2]})
    unit = runs[0].unit if len({run.unit for run in runs}) == 1 else None
    for index, run in enumerate(runs):
        colour = f"C{index % 10}"
        _draw(loss, run.values("loss"), colour, smooth, label=f"{run.name}, training")
        _draw(norm, run.values("grad_norm"), colour, smooth)
        _draw(speed, run.values(f"{run.unit}_per_s"), colour, smooth)
        if held_out := run.held_out():
            marker = "o" if len(held_out) <= MAX_MARKERS else None
            label = f"{run.name}, held out"
            loss.plot(*_points(held_out), color=colour, linestyle="--", marker=marker, markersize=4, label=label)
    loss.set_ylabel("loss")
    norm.set_ylabel("gradient norm")
    speed.set_ylabel(f"{unit}/s" if unit else "tokens/s or examples/s")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.set_xlabel("step")
    for axes in (loss, norm, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=8)
    figure.legend(*loss.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.align_ylabels()
    with writing_whole("plot", file) as partial:
        figure.savefig(partial, dpi=150)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """The exponential running mean, corrected at its start, where it has few values."""
    mean, total, result = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        result.append(mean / total)
    return result


def _draw(axes: "Axes", values: Mapping[int, float], colour: str, smooth: float, label: str | None = None) -> None:
    steps, numbers = _points(values)
    marker = "o" if len(steps) == 1 else None
    if smooth:
        axes.plot(steps, numbers, color=colour, alpha=0.25, linewidth=1)
        numbers = smoothed(numbers, smooth)
    axes.plot(steps, numbers, color=colour, linewidth=1.4, marker=marker, label=label)


def _points(values: Mapping[int, float]) -> tuple[list[int], list[float]]:
    steps = sorted(values)
    return steps, [values[step] for step in steps]
