"""Tables of what layers cost, and of what cutting by these costs would gain."""

from itertools import groupby

from rich.console import Console

from meshpipe.layers.staged_model import StagedModel
from meshpipe.plan.layer_costs import LayerCosts, ModelCosts
from meshpipe.plan.plan import Op
from meshpipe.plan.simulate import Timeline, simulate
from meshpipe.report.columns import Columns
from meshpipe.report.tables import describe_layers, format_bytes, make_table


def print_profile(console: Console, costs: ModelCosts, before: StagedModel, after: StagedModel) -> None:
    """The costs of every layer, and the stages and predicted steps of the current and of the proposed cut."""
    setting = costs.setting
    if costs.counted is None:
        how = f"Measured on {costs.device} (data {setting.data} x tensor {setting.tensor}) in {costs.seconds:.1f} s"
    else:
        console.print(f"Not measured: {costs.counted}.", markup=False)
        how = f"{costs.device[0].upper()}{costs.device[1:]} (data {setting.data} x tensor {setting.tensor})"
    console.print(
        f"{how}: milliseconds of a microbatch of {setting.microbatch_size}, bytes on each device, "
        f"remat {setting.remat}."
    )
    console.print(layer_table(costs))
    console.print()
    console.print(cut_table({_name(before): before, "measured": after}))
    if after.cuts == before.cuts:
        console.print("\nNo cut has a faster slowest stage than the current one.\n")
        return
    old, new = (_timeline(model).makespan for model in (before, after))
    console.print(
        f"\nPredicted step: {_milliseconds(old)} ms before, {_milliseconds(new)} ms after ({new / old - 1:+.1%})."
    )
    if new < old:
        first = ",".join(str(cut.start) for cut in after.cuts)
        console.print(f"Use it with --partition measured, or without measuring again with --partition {first}.\n")
    else:
        console.print("The proposed cut has a faster slowest stage, but no shorter step: keep the current one.\n")


def layer_table(costs: ModelCosts) -> Columns:
    """One row per layer, or per run of equal ones: milliseconds of its programs, and bytes."""
    names = ("F", "B", "I", "W", "transfer", "parameters", "activations")
    table = make_table("layer", "kind", *names, right=("layer", *names))
    for _, run in groupby(enumerate(costs.layers), key=lambda numbered: _cells(numbered[1])):
        (first, layer), *others = run
        table.add_row(f"{first}-{others[-1][0]}" if others else str(first), *_cells(layer))
    return table


def _cells(layer: LayerCosts) -> tuple[str, ...]:
    times = (*(layer.time(op) for op in Op), layer.transfer)
    sizes = (layer.parameter_bytes, layer.activation_bytes)
    return (layer.kind, *map(_milliseconds, times), *map(format_bytes, sizes))


def cut_table(models: dict[str, StagedModel]) -> Columns:
    """One row per stage of each cut: milliseconds of one microbatch, and of all work of its rank in a step."""
    right = ("stage", "rank", "a microbatch", "rank busy a step", "step", "bubble")
    table = make_table("cut", "stage", "rank", "layers", *right[2:], right=right)
    for name, model in models.items():
        timeline = _timeline(model)
        for stage in model.stages:
            first = stage.index == 0
            is_last_of_rank = stage.index == max(model.plan.stages_of(stage.rank))
            table.add_row(
                name if first else "",
                str(stage.index),
                str(stage.rank),
                describe_layers(stage.layers),
                _milliseconds(_of_microbatch(model, stage.index)),
                _milliseconds(timeline.busy[stage.rank]) if is_last_of_rank else "",
                _milliseconds(timeline.makespan) if first else "",
                f"{timeline.bubble_fraction:.1%}" if first else "",
            )
    return table


def _timeline(model: StagedModel) -> Timeline:
    return simulate(model.plan, model.stage_costs)


def _of_microbatch(model: StagedModel, stage: int) -> float:
    """The time that a stage takes for its work on one microbatch."""
    costs = model.stage_costs
    assert costs is not None
    return sum(costs.time_of(a) for a in model.plan.actions if a.stage == stage and a.microbatch == 0)


def _name(model: StagedModel) -> str:
    return "given" if model.config.boundaries is not None else model.config.partition


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"
