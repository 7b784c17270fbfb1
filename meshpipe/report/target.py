"""The tables of `plan --target`: what XLA made of a step's programs for a machine, and what that takes there."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console

from meshpipe.choose.step_prediction import ONCE, StepPrediction
from meshpipe.choose.step_time import SECONDS_PER_ACTION
from meshpipe.compiled.collectives import Collective
from meshpipe.compiled.program import CompiledProgram
from meshpipe.report.columns import Columns
from meshpipe.report.tables import ROUNDS_UP, format_bytes, format_seconds, make_table, print_text


def print_prediction(console: Console, target: str, prediction: StepPrediction) -> None:
    """Memory, programs, times and throughput of a step on a target, which `target` describes."""
    print_text(console, f"\nPrograms compiled for {target}, bytes on each device:")
    console.print(program_table(prediction))
    print_text(console, f"\nMemory of each device, of {format_bytes(prediction.hardware.memory_bytes)}:")
    console.print(target_memory_table(prediction))
    print_text(console, fits_line(prediction))
    console.print()
    for line in time_lines(prediction):
        print_text(console, line)


def prediction_values(prediction: StepPrediction) -> dict[str, Any]:
    """The same in numbers, for JSON: times in seconds, memory and traffic in bytes of a device. Times are null where a
    program is refused.
    """
    timeline = prediction.timeline
    times = {
        "step_s": prediction.step_seconds,
        "tokens_per_s" if prediction.tokens else "examples_per_s": prediction.throughput,
        "model_flops_utilisation": prediction.utilisation,
        "bubble_fraction": timeline.bubble_fraction,
        "host_s": prediction.time.host,
    }
    return {
        **(dict.fromkeys(times) if prediction.refused else times),
        "transfer_s": timeline.transfer,
        "memory_bytes": prediction.hardware.memory_bytes,
        "missing_bytes": prediction.missing,
        "ranks": [
            {"rank": rank.rank, **rank.parts, "peak": rank.total, "peak_in": rank.peak_in} for rank in prediction.ranks
        ],
        "programs": [
            {**asdict(program), "flops": program.flops, "seconds": seconds}
            for program, seconds in zip(prediction.programs, prediction.seconds, strict=True)
        ],
    }


def program_table(prediction: StepPrediction) -> Columns:
    """One row per program; stages with equal programs share a row."""
    right = ("time", "FLOPs", "read, written", "arguments", "outputs", "aliased", "temporaries")
    names = ("stage", "program", "runs per step", *right, "collectives")
    table = make_table(*names, right=right, wrap=("collectives",), keys=2)
    count = prediction.timeline.plan.num_microbatches
    for stages, program, seconds in _equal_ones(prediction):
        table.add_row(
            _numbers(stages),
            f"{program.name} (refused)" if program.is_refused else program.name,
            "once" if program.name in ONCE else str(count),
            *(
                ("?", "?", "?")
                if program.is_refused
                else (format_seconds(seconds), _count(program.flops), format_bytes(program.bytes_accessed))
            ),
            *map(format_bytes, (program.arguments, program.outputs, program.aliased, program.temporaries)),
            ", ".join(map(describe_collective, program.collectives)),
        )
    return table


def _equal_ones(prediction: StepPrediction) -> Iterable[tuple[list[int], CompiledProgram, float]]:
    """Equal programs with their stages, in the order of stages and programs."""
    found: dict[CompiledProgram | tuple[object, ...], tuple[list[int], CompiledProgram, float]] = {}
    for program, seconds in zip(prediction.programs, prediction.seconds, strict=True):
        same = replace(program, stage=0)
        key = tuple(sorted(same.products.items())), tuple(value for k, value in vars(same).items() if k != "products")
        found.setdefault(key, ([], program, seconds))[0].append(program.stage)
    return found.values()


def describe_collective(collective: Collective) -> str:
    """`2 all-reduce over data, 1.5 GB`."""
    axes = " and ".join(collective.axes) or "unknown axes"
    return f"{collective.count} {collective.kind} over {axes}, {format_bytes(collective.bytes)}"


def target_memory_table(prediction: StepPrediction) -> Columns:
    """One row per rank: what each of its devices holds at the peak, and how much of it is left."""
    parts = ("parameters", "gradients", "optimizer", "batch", "residuals", "transfers", "temporaries")
    names = (*parts, "peak", "free")
    table = make_table("rank", *names, "peak in", right=("rank", *names))
    for rank in prediction.ranks:
        sizes = (*rank.parts.values(), rank.total)
        free = prediction.hardware.memory_bytes - rank.total
        left = format_bytes(free) if free >= 0 else f"-{format_bytes(-free)}"
        style = "" if free >= 0 else "bold red"
        table.add_row(str(rank.rank), *map(format_bytes, sizes), left, rank.peak_in, style=style)
    return table


def fits_line(prediction: StepPrediction) -> str:
    """Whether the step fits, or by how much it does not."""
    fullest, there = prediction.fullest, prediction.hardware.memory_bytes
    if prediction.missing:
        return (
            f"It does not fit: rank {fullest.rank} needs {format_bytes(fullest.total)} on each device, "
            f"{format_bytes(prediction.missing)} more than there are."
        )
    return f"It fits: rank {fullest.rank}, the fullest, uses {fullest.total / there:.0%} of the memory of its devices."


def time_lines(prediction: StepPrediction) -> list[str]:
    """Step time, throughput, MFU, bubble, and what moves over the links."""
    if prediction.refused:
        names = ", ".join(f"{program.name} of stage {program.stage}" for program in prediction.refused)
        return [f"XLA refuses to compile what is larger than a device, so times are not predicted: {names}."]
    timeline, what = prediction.timeline, "tokens" if prediction.tokens else "examples"
    per_device = prediction.throughput / prediction.num_devices
    lines = [
        f"Predicted step time {format_seconds(prediction.step_seconds)}: {prediction.throughput:,.0f} {what}/s "
        f"({per_device:,.0f} per device), MFU {prediction.utilisation:.1%}, bubble {timeline.bubble_fraction:.1%}; "
        f"{format_seconds(prediction.time.around)} of it before and after the microbatches.",
    ]
    if prediction.time.host:
        lines.append(
            f"{format_seconds(prediction.time.host)} of it the devices wait for their host, which takes about "
            f"{format_seconds(SECONDS_PER_ACTION)} to start an action: larger microbatches need fewer."
        )
    for heading, once in (("per microbatch", False), ("per step", True)):
        totals = _collectives(prediction.programs, once=once)
        if totals:
            lines.append(f"Collectives {heading}, over all stages: {', '.join(map(describe_collective, totals))}.")
    if timeline.transfer:
        lines.append(f"A move between ranks takes {format_seconds(timeline.transfer)} at most.")
    efficiency = ", ".join(f"{name} {share:.0%}" for name, share in prediction.hardware.efficiency.items())
    lines.append(f"Times assume these shares of {prediction.hardware.name}'s peak rates: {efficiency}.")
    return lines


def _collectives(programs: Sequence[CompiledProgram], *, once: bool) -> list[Collective]:
    """Those of all stages added up, of programs that run once per step, or of the others."""
    found: dict[tuple[str, tuple[str, ...]], Collective] = {}
    for program in programs:
        for c in program.collectives if (program.name in ONCE) is once else ():
            known = found.get((c.kind, c.axes), replace(c, count=0, bytes=0))
            found[c.kind, c.axes] = replace(known, count=known.count + c.count, bytes=known.bytes + c.bytes)
    return list(found.values())


def _numbers(stages: Sequence[int]) -> str:
    """`0-2, 5` for a list of numbers in order."""
    runs: list[list[int]] = []
    for stage in stages:
        if runs and runs[-1][1] == stage - 1:
            runs[-1][1] = stage
        else:
            runs.append([stage, stage])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _count(number: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= ROUNDS_UP * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"
