"""Tables and pictures of a run: layout, stages, plan, memory."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import optax
from rich.console import Console

from meshpipe.choose.memory import RankMemory, predict_memory, stage_memory
from meshpipe.layers.staged_model import StagedModel
from meshpipe.mesh import describe, on_cpu
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.simulate import Costs, StageMemory, simulate
from meshpipe.report.columns import Columns
from meshpipe.report.comparison import Comparison
from meshpipe.report.graph import MOVES, forward_only_line, traffic_table, what_stages_run
from meshpipe.report.picture import FORWARDS, Panel, draw_timelines
from meshpipe.report.tables import count_of, describe_layers, format_bytes, make_table, print_text

EQUAL_COSTS = "if stages cost the same and backward twice forward"
"""What a bubble assumes where no costs are known."""


@runtime_checkable
class Stage(Protocol):
    """What the tables show of a stage."""

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
    @property
    def trained_count(self) -> int: ...


def layout_lines(recipe: str, model: StagedModel, notes: Sequence[str] | None = None) -> list[str]:
    """What runs where, in three lines, and notes; by default those about the model."""
    parameters = sum(stage.parameter_count for stage in model.stages)
    stages = "  ".join(f"{s.index} (rank {s.rank}) {describe_layers(s.layers)}" for s in _abridge(model.stages))
    return [
        f"{recipe}: {parameters:,} parameters on {describe(model.mesh)}",
        f"stages: {stages}",
        f"{model.plan.schedule}, {_microbatches(model)}, remat {_remat(model)}, "
        f"expected bubble {simulate(model.plan, model.stage_costs).bubble_fraction:.1%}{_how_chosen(model)}",
        *_few_microbatches(model.plan),
        *forward_only_line(model.plan.graph),
        *(model.notes if notes is None else notes),
        *(() if on_cpu(model.mesh) else model.choices),
    ]


def _few_microbatches(plan: Plan) -> list[str]:
    """A line about a bubble that is larger than it needs to be."""
    if plan.num_microbatches >= plan.num_ranks:
        return []
    return ["Fewer microbatches than ranks: most ranks wait most of the time. Raise --num-microbatches."]


def print_layout(console: Console, recipe: str, model: StagedModel) -> None:
    """What runs where, for the devices of the model's mesh, and a table of the stages."""
    for line in layout_lines(recipe, model):
        print_text(console, line)
    names = [layer.class_name for layer in model.layers]
    console.print(stage_table(model.stages, names, _remat_of_stages(model), what_stages_run(model.plan.graph)))


def _how_chosen(model: StagedModel) -> str:
    """The costs that the bubble assumes, or equal stages; and how stages were cut, unless evenly."""
    partition = model.config.partition
    cut = "" if partition == "even" else f", partition {partition}"
    return f" if stages cost the same{cut}" if model.layer_costs is None else f"{cut}, {model.layer_costs.describe()}"


def _remat(model: StagedModel) -> str:
    """One name if all stages have the same, else one per stage; preceded by `auto` if they were chosen. Policies of
    layers as they are given.
    """
    if "=" in model.config.remat:
        return model.config.remat
    names = model.remat or ()
    text = names[0] if len(set(names)) == 1 else " ".join(names)
    return f"auto ({text})" if model.config.remat == "auto" else text


def _remat_of_stages(model: StagedModel) -> Sequence[str]:
    if "=" not in model.config.remat:
        return model.remat or ()
    return [_run_lengths([model.layer_remat[i] for i in stage.layers]) for stage in model.stages]


def _microbatches(model: StagedModel) -> str:
    count = model.plan.num_microbatches
    (batch_size,) = {shape.shape[0] for shape in model.microbatches.shapes.values()}
    return f"{count_of(count, 'microbatch', 'microbatches')} of {count_of(batch_size // count, 'example')}"


def _mesh_sizes(model: StagedModel) -> str:
    """The axes without the platform: a plan is for whatever devices will run it."""
    count = model.mesh.devices.size
    return " x ".join(f"{axis} {size}" for axis, size in model.mesh.shape.items()) + f" = {count_of(count, 'device')}"


def _abridge(stages: Sequence[Stage], longest: int = 8) -> Sequence[Stage]:
    return stages if len(stages) <= longest else [*stages[: longest - 1], stages[-1]]


def stage_table(
    stages: Sequence[Stage], layer_names: Sequence[str], remat: Sequence[str] = (), runs: Sequence[str] = ()
) -> Columns:
    """One row per stage: rank, layers by class, number of parameters, and their bytes over the whole submesh.

    `remat` has the rematerialisation of every stage, and `runs` what it runs; without them, these columns are left out.
    The number of trained parameters is shown where that is not all.
    """
    some_frozen = any(stage.trained_count < stage.parameter_count for stage in stages)
    names = ("stage", "rank", "layers", "kinds", "parameters", *["trained"] * some_frozen, "bytes")
    names = (*names, *["remat"] * bool(remat), *["runs"] * bool(runs))
    right = ("stage", "rank", "parameters", "trained", "bytes")
    table = make_table(*names, right=right, wrap=("kinds", "remat", "runs"))
    for stage in stages:
        kinds = _run_lengths([layer_names[i] for i in stage.layers])
        layers = f"{stage.layers.start}-{stage.layers.stop - 1}" if len(stage.layers) > 1 else str(stage.layers.start)
        table.add_row(
            str(stage.index),
            str(stage.rank),
            layers,
            kinds,
            f"{stage.parameter_count:,}",
            *[f"{stage.trained_count:,}"] * some_frozen,
            format_bytes(stage.parameter_bytes),
            *remat[stage.index : stage.index + 1],
            *runs[stage.index : stage.index + 1],
        )
    if len(stages) > 1:
        count, size = sum(s.parameter_count for s in stages), sum(s.parameter_bytes for s in stages)
        trained = [f"{sum(s.trained_count for s in stages):,}"] * some_frozen
        table.add_row("all", "", "", "", f"{count:,}", *trained, format_bytes(size), style="bold")
    return table


def _run_lengths(names: Sequence[str]) -> str:
    """`Embed, 3 Block, Head` for a list of names."""
    runs: list[list[Any]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    return ", ".join(name if count == 1 else f"{count} {name}" for name, count in runs)


def memory_table(ranks: Sequence[RankMemory]) -> Columns:
    """One row per rank: what each of its devices holds at the peak of a step."""
    inside = any(rank.temporaries for rank in ranks)
    names = ("parameters", "gradients", "optimizer", "batch", "activations", *["temporaries"] * inside)
    names = (*names, "sum", "live")
    table = make_table("rank", *names, right=("rank", *names))
    for rank in ranks:
        stored = (rank.parameters, rank.gradients, rank.optimizer, rank.batch, rank.activations)
        parts = (*stored, *[rank.temporaries] * inside, rank.total)
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


def difference_table(differences: Iterable[Difference]) -> Columns:
    """One row per layer and quantity: the largest difference, and what is allowed."""
    table = make_table("layer", "quantity", "difference", "allowed", "", right=("difference", "allowed"))
    for d in differences:
        mark = "" if d.ok else "differs"
        table.add_row(d.layer, d.quantity, f"{d.found:.2g}", f"{d.allowed:.2g}", mark, style="" if d.ok else "bold red")
    return table


def print_plan(
    console: Console,
    recipe: str,
    model: StagedModel,
    transformation: optax.GradientTransformation,
    plot: Path | None,
    *,
    wide: bool = False,
) -> None:
    """Everything known about a step before it runs: mesh, stages, order of work, bubble and memory.

    On a terminal, a grid that is too wide is shown in part; with `wide`, all of it in pages.
    """
    costs = model.layer_costs
    graph = model.plan.graph
    times = model.stage_costs or Costs.of_parts(model.plan.num_stages // model.plan.num_ranks, graph=graph)
    memory = stage_memory(model, transformation)
    timeline = simulate(model.plan, times, memory, model.late)
    ranks = predict_memory(model, transformation)  # traces, which says so: before anything is printed
    console.print(f"{recipe}: {_mesh_sizes(model)}\n")
    names = [layer.class_name for layer in model.layers]
    console.print(stage_table(model.stages, names, _remat_of_stages(model), what_stages_run(graph)))
    for note in (*model.notes, *model.choices):
        print_text(console, note)
    console.print(f"\n{model.plan.schedule}, {_microbatches(model)}, every action drawn one unit long:")
    pages = list(model.plan.pages(console.width)) if console.is_terminal else [model.plan.grid()]
    for page in pages if wide else pages[:1]:
        console.print(page, markup=False)
    if len(pages) > 1 and not wide:
        console.print(f"This is the first of {len(pages)} pages. Add --wide to see all.\n")
    for line in forward_only_line(graph):
        print_text(console, line)
    assumed = f" {EQUAL_COSTS}" if costs is None else f", by {costs.describe()}"
    print_text(console, f"Expected bubble {timeline.bubble_fraction:.1%}{assumed}.\n")
    for line in _unsplit(model, memory):
        print_text(console, line)
    if not graph.is_chain and graph.values:
        print_text(console, MOVES)
        console.print(traffic_table(model.lowered, memory, model.late))
        console.print()
    print_text(console, f"Expected memory of each device of a rank, remat {_remat(model)}; live: microbatches at once:")
    console.print(memory_table(ranks))
    if plot is not None:
        title = f"{model.plan.schedule}, {_microbatches(model)}"
        draw_timelines([Panel(timeline, title, in_seconds=costs is not None)], plot)
        console.print(f"\nDrawn in {plot}.")


def _unsplit(model: StagedModel, memory: Sequence[StageMemory]) -> Iterator[str]:
    """Says where a plan splits a backward that cannot be split, so that its weight part is empty."""
    splits = any(action.op is Op.BACKWARD_WEIGHT for action in model.plan.actions)
    whole = [s for s, kept in enumerate(memory) if splits and kept.kept_for_weights + kept.made_for_weights == 0]
    if whole:
        stages = f"stage{'s' if len(whole) > 1 else ''} {', '.join(map(str, whole))}"
        yield f"The backward of {stages} cannot be split (a loop over layers computes both parts): I does it all.\n"


def print_comparison(console: Console, recipe: str, config: PipelineConfig, comparisons: Iterable[Comparison]) -> None:
    """Every schedule for a recipe, and what the columns mean."""
    rows = list(comparisons)
    measured = any(row.schedule.startswith("auto") for row in rows)
    microbatches = count_of(config.num_microbatches, "microbatch", "microbatches")
    assumed = "by the costs of layers" if measured else EQUAL_COSTS
    print_text(console, f"{recipe}: every schedule with {microbatches}, {assumed}\n")
    console.print(comparison_table(rows, in_seconds=measured))
    unit = "in seconds" if measured else f"in {FORWARDS}; without a bubble it takes {3 * config.num_microbatches}"
    print_text(
        console,
        f"\nThe length of a step is {unit}. The bubble between steps is what remains when the next step fills the ends "
        "of this one. Live activations are microbatches of all layers of a rank; memory is that of the fullest device.",
    )


def comparison_table(comparisons: Iterable[Comparison], *, in_seconds: bool = False) -> Columns:
    """One row per schedule, the fastest first: step, bubble and memory in simulation, or why it does not fit."""
    step = "step, s" if in_seconds else "step"
    names = ("stages per rank", step, "bubble", "bubble between steps", "live activations", "memory")
    table = make_table("schedule", *names, "", right=names)
    rows = list(comparisons)
    fitting = [(c, c.timeline) for c in rows if c.timeline is not None]
    for place, (c, t) in enumerate(sorted(fitting, key=lambda row: (row[1].makespan, max(row[1].peak_bytes)))):
        count = t.plan.num_stages // t.plan.num_ranks
        table.add_row(
            c.schedule,
            str(count),
            f"{t.makespan:.4g}",
            f"{t.bubble_fraction:.1%}",
            f"{t.bubble_between_steps:.1%}",
            f"{max(t.peak_activations) / count:.3g}",
            format_bytes(max(t.peak_bytes)),
            "" if place else "fastest",
            style="" if place else "bold",
        )
    for c in rows:
        if c.timeline is None:
            table.add_row(c.schedule, c.stages_per_rank or "", rest=f"does not fit: {c.reason}")
    return table
