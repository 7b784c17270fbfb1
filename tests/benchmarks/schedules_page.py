"""Makes the tables and pictures of docs/schedules.md anew, by running every schedule on stages that sleep.

    python tests/benchmarks/schedules_page.py

A minute or two; needs g++ and matplotlib.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmark import median, times_of
from schedule_quality import SleepingStep
from sleeping_layer import register

import meshpipe
from meshpipe.plan.schedules import SCHEDULES, STAGES_PER_RANK, make_plan
from meshpipe.plan.simulate import Costs, StageMemory, simulate
from meshpipe.report.picture import Panel, draw_timelines

DOCS = Path(__file__).resolve().parents[2] / "docs"
RANKS, MICROBATCHES, SECONDS = 4, (4, 8, 16), 0.02
PICTURES = ("1f1b", "zb-h1", "zb-v")
TRAINING = tuple(name for name in SCHEDULES if name != "inference")


def main() -> None:
    meshpipe.use_cpu_devices(RANKS)
    register()
    page = DOCS / "schedules.md"
    text = page.read_text()
    text = replace_table(text, "simulated", simulated_rows())
    text = replace_table(text, "measured", measured_rows())
    page.write_text(text)
    for name in PICTURES:
        draw(name)


def simulated_rows() -> Iterable[Sequence[str]]:
    yield ["schedule", "stages per rank", *(f"bubble, M = {m}" for m in MICROBATCHES), "activations held, M = 16"]
    for name in TRAINING:
        count, _ = STAGES_PER_RANK[name]
        # An activation of all layers of a rank counts 1.
        memory = [StageMemory(activation=1 / count, kept_for_weights=1 / count)] * (RANKS * count)
        steps = [simulate(make_plan(name, RANKS, m), Costs.of_parts(count), memory) for m in MICROBATCHES]
        held = max(steps[-1].peak_bytes)
        yield [f"`{name}`", str(count), *(f"{step.bubble_fraction:.1%}" for step in steps), f"{held:.3g}"]


def measured_rows() -> Iterable[Sequence[str]]:
    yield ["schedule", *(f"{what}, M = {m}" for m in MICROBATCHES for what in ("predicted", "measured"))]
    for name in TRAINING:
        cells = []
        for count in MICROBATCHES:
            step = SleepingStep(name, RANKS, count, SECONDS)
            measured = median(times_of(step.run, 5))
            cells += [f"{step.work / step.predicted().makespan:.1%}", f"{step.work / measured:.1%}"]
        yield [f"`{name}`", *cells]


def draw(name: str) -> None:
    step = SleepingStep(name, RANKS, 8, SECONDS)
    step.run()
    step.measure()  # the first compiles what the clock needs
    panels = [
        Panel(step.predicted(), f"{name}, predicted", in_seconds=True),
        Panel(step.measure().timeline, f"{name}, measured", in_seconds=True),
    ]
    draw_timelines(panels, DOCS / "images" / f"{name}_predicted_and_measured.png")


def replace_table(text: str, name: str, rows: Iterable[Sequence[str]]) -> str:
    """The page with a new table in place of the lines directly after `<!-- NAME -->`."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    pattern = re.compile(rf"(<!-- {name} -->\n)(?:\|.*\n)*")
    assert pattern.search(text), f"the page has no line <!-- {name} -->"
    return pattern.sub(lambda match: f"{match[1]}{table}\n", text)


if __name__ == "__main__":
    main()
