"""Tables and pictures of a run for people: layout, stages, plan, memory."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import optax
from rich.console import Console
from rich.table import Table

from meshpipe.layer import Layer
from meshpipe.memory import RankMemory, predict_memory
from meshpipe.mesh import describe
from meshpipe.pipeline.plan import Op
from meshpipe.pipeline.simulate import Timeline, simulate
from meshpipe.staged_model import StagedModel

PLAIN_WIDTH = 240
"""Characters of a line where the output is no terminal, so that no row is folded in a file or a pipe."""

COLOURS = {
    Op.FORWARD: "#8fb8de",
    Op.BACKWARD: "#f2b880",
    Op.BACKWARD_INPUT: "#f2b880",
    Op.BACKWARD_WEIGHT: "#a8cf9a",
}
NAMES = {
    Op.FORWARD: "F forward",
    Op.BACKWARD: "B backward",
    Op.BACKWARD_INPUT: "I backward, input",
    Op.BACKWARD_WEIGHT: "W backward, weight",
}


@runtime_checkable
class Stage(Protocol):
    """What the tables need of a stage."""

    @property
    def index(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def layers(self) -> range: ...
    @property
    def parameter_count(self) -> int: ...
    @property
    def parameter_bytes(self) -> int: ...


def make_console(*, stderr: bool = False) -> Console:
    """Standard output, or error: as wide as the terminal, or wide enough for any table."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    return (
        console if console.is_terminal else Console(stderr=stderr, highlight=False, soft_wrap=True, width=PLAIN_WIDTH)
    )


def make_table(*columns: str, right: Iterable[str] = ()) -> Table:
    """An empty table that stays readable in a file: columns apart by spaces, numbers to the right."""
    right = set(right)
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def layout_lines(recipe: str, model: StagedModel) -> list[str]:
    """What runs where, in three lines."""
    parameters = sum(stage.parameter_count for stage in model.stages)
    stages = "  ".join(f"{s.index} (rank {s.rank}) {describe_layers(s.layers)}" for s in _abridge(model.stages))
    return [
        f"{recipe}: {parameters:,} parameters on {describe(model.mesh)}",
        f"stages: {stages}",
        f"{model.plan.schedule}, {_microbatches(model)}, remat {_remat(model)}, "
        f"expected bubble {simulate(model.plan).bubble_fraction:.1%}",
    ]


def _remat(model: StagedModel) -> str:
    """One name where all stages have the same, else one for each; after `auto` where they were chosen."""
    names = model.remat or ()
    text = names[0] if len(set(names)) == 1 else " ".join(names)
    return f"auto ({text})" if model.config.remat == "auto" else text


def _microbatches(model: StagedModel) -> str:
    count = model.plan.num_microbatches
    (batch_size,) = {shape.shape[0] for shape in model.batch_shapes.values()}
    return f"{_count(count, 'microbatch', 'microbatches')} of {_count(batch_size // count, 'example')}"


def _mesh_sizes(model: StagedModel) -> str:
    """The axes without the platform, since a plan is for whatever devices there will be."""
    count = model.mesh.devices.size
    return " x ".join(f"{axis} {size}" for axis, size in model.mesh.shape.items()) + f" = {_count(count, 'device')}"


def _abridge(stages: Sequence[Stage], longest: int = 8) -> Sequence[Stage]:
    return stages if len(stages) <= longest else [*stages[: longest - 1], stages[-1]]


def describe_layers(layers: range) -> str:
    return f"layer {layers.start}" if len(layers) == 1 else f"layers {layers.start}-{layers.stop - 1}"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def format_bytes(count: int | float) -> str:
    """Bytes in three digits and a unit of 1000: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def stage_table(stages: Sequence[Stage], layer_names: Sequence[str], remat: Sequence[str] = ()) -> Table:
    """A row a stage: its rank, its layers by class, parameters and their bytes over the whole submesh.

    `remat` has the rematerialisation of every stage, or is left out.
    """
    names = ("stage", "rank", "layers", "kinds", "parameters", "bytes", *(("remat",) if remat else ()))
    table = make_table(*names, right=("stage", "rank", "parameters", "bytes"))
    for stage in stages:
        kinds = _run_lengths([layer_names[i] for i in stage.layers])
        layers = f"{stage.layers.start}-{stage.layers.stop - 1}" if len(stage.layers) > 1 else str(stage.layers.start)
        table.add_row(
            str(stage.index),
            str(stage.rank),
            layers,
            kinds,
            f"{stage.parameter_count:,}",
            format_bytes(stage.parameter_bytes),
            *remat[stage.index : stage.index + 1],
        )
    if len(stages) > 1:
        count, size = sum(s.parameter_count for s in stages), sum(s.parameter_bytes for s in stages)
        table.add_row("all", "", "", "", f"{count:,}", format_bytes(size), style="bold")
    return table


def _kind(layer: Layer) -> str:
    """The name of the layer's class."""
    root: Any = layer.graphdef.nodes[0]
    return root.type.__name__


def _run_lengths(names: Sequence[str]) -> str:
    """`Embed, 3 Block, Head` for a list of names."""
    runs: list[list[Any]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in runs)


def memory_table(ranks: Sequence[RankMemory]) -> Table:
    """A row a rank: what each of its devices holds at the peak of a step."""
    names = ("parameters", "gradients", "optimizer", "batch", "activations", "sum", "live microbatches")
    table = make_table("rank", *names, right=("rank", *names))
    for rank in ranks:
        parts = (rank.parameters, rank.gradients, rank.optimizer, rank.batch, rank.activations, rank.total)
        table.add_row(str(rank.rank), *map(format_bytes, parts), str(rank.live_activations))
    return table


@runtime_checkable
class Difference(Protocol):
    """What the table needs of a difference between a layout and one device."""

    @property
    def layer(self) -> str: ...
    @property
    def quantity(self) -> str: ...
    @property
    def found(self) -> float: ...
    @property
    def allowed(self) -> float: ...
    @property
    def ok(self) -> bool: ...


def difference_table(differences: Iterable[Difference]) -> Table:
    """A row a layer and quantity: its largest difference and what is allowed."""
    table = make_table("layer", "quantity", "difference", "allowed", "", right=("difference", "allowed"))
    for d in differences:
        mark = "" if d.ok else "differs"
        table.add_row(d.layer, d.quantity, f"{d.found:.2g}", f"{d.allowed:.2g}", mark, style="" if d.ok else "bold red")
    return table


def print_plan(
    console: Console, recipe: str, model: StagedModel, transformation: optax.GradientTransformation, plot: Path | None
) -> None:
    """Everything that is known of a step before it runs: mesh, stages, order of work, bubble and memory."""
    timeline = simulate(model.plan)
    console.print(f"{recipe}: {_mesh_sizes(model)}\n")
    console.print(stage_table(model.stages, [_kind(layer) for layer in model.layers], model.remat or ()))
    width = console.width if console.is_terminal else None
    console.print(f"\n{model.plan.schedule}, {_microbatches(model)}, every action drawn one unit long:")
    console.print(model.plan.grid(width=width), markup=False)
    console.print(
        f"Expected bubble {timeline.bubble_fraction:.1%}, if stages cost the same and backward twice forward.\n"
    )
    console.print(f"Expected memory of each device of a rank, remat {_remat(model)}:")
    console.print(memory_table(predict_memory(model, transformation)))
    if plot is not None:
        plot_timeline(timeline, plot)
        console.print(f"\nDrawn in {plot}.")


def check_picture(file: Path) -> None:
    """Raises `ValueError` when a picture cannot be drawn into that file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError("--plot needs matplotlib. Install it by: pip install 'meshpipe[plot]'.") from None
    formats = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.lstrip(".").lower() not in formats:
        raise ValueError(
            f"--plot must name a file whose suffix is one of {', '.join(sorted(formats))}. Got {str(file)!r}."
        )
    if not file.parent.is_dir():
        raise ValueError(
            f"--plot must name a file in a folder that exists. Got {str(file)!r}, and there is no {file.parent}."
        )


def plot_timeline(timeline: Timeline, file: Path) -> None:
    """Draws a row a rank and time to the right; call `check_picture` first."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    plan = timeline.plan
    figure = Figure(
        figsize=(min(24.0, 3 + 0.22 * timeline.makespan), 1.6 + 0.45 * plan.num_ranks), layout="constrained"
    )
    axes = figure.subplots()
    inches = figure.get_figwidth() / timeline.makespan
    for rank, order in enumerate(plan.orders):
        for action in order:
            start, width = timeline.starts[action], timeline.ends[action] - timeline.starts[action]
            axes.barh(rank, width, left=start, height=0.9, color=COLOURS[action.op], edgecolor="white", linewidth=0.7)
            label = str(action) if plan.num_stages > plan.num_ranks else str(action.microbatch)
            if width * inches > 0.09 * len(label):
                axes.text(start + width / 2, rank, label, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(plan.num_ranks), [f"rank {rank}" for rank in range(plan.num_ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.makespan)
    axes.set_xlabel("time, in forwards of one stage")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(f"{plan.schedule}, {_count(plan.num_microbatches, 'microbatch', 'microbatches')}: "
                    f"bubble {timeline.bubble_fraction:.1%}", fontsize=10)  # fmt: skip
    used = {action.op for action in plan.actions}
    patches = [Patch(color=COLOURS[op], label=NAMES[op]) for op in Op if op in used]
    figure.legend(handles=patches, loc="outside lower right", ncols=len(patches), frameon=False, fontsize=8)
    figure.savefig(file, dpi=150)
