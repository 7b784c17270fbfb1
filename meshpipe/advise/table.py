"""What people read of an advice."""

import textwrap

from rich.console import Console

from meshpipe.advise.advice import Advice, Confirmed
from meshpipe.advise.estimate import Estimate
from meshpipe.report.columns import Columns
from meshpipe.report.tables import count_of, format_bytes, make_table, print_text


def print_advice(console: Console, recipe: str, advice: Advice, top: int) -> None:
    """The best few layouts, why each family lost, and the command that runs the winner."""
    print_text(
        console,
        f"{recipe} on {advice.devices}: a batch of {count_of(advice.batch_size, 'example')}. "
        f"{advice.considered:,} layouts, {advice.simulated:,} simulated, in {advice.seconds:.0f} s. The times of "
        f"layers are {advice.layers}.\n",
    )
    if advice.best:
        ways = list(dict.fromkeys(found.how for found in advice.best[:top]))
        console.print(_best_table(advice, top, show_way=len(ways) > 1))
        all_alike = f"All numbers are {ways[0]}. " if len(ways) == 1 else ""
        print_text(
            console,
            f"\n{all_alike}Moved: bytes that a device sends to others in a step. Memory is that of the fullest device, "
            f"of {format_bytes(advice.limit)} that it may use.\n",
        )
    for refused in advice.refused:
        print_text(console, f"Not {_words(refused.estimate)}: {refused.reason}.\n")
    print_text(console, "The best of every kind of parallelism, and why it lost:")
    console.print(_family_table(advice))
    if advice.command:
        print_text(console, "\nTo run the best:")
        # The terminal breaks a long line itself: then it can be copied as one.
        console.print(f"  {advice.command}", markup=False, soft_wrap=True)
        if advice.hosts > 1:
            print_text(
                console,
                f"on each of the {advice.hosts:,} hosts; docs/multi-host.md says how they find each other "
                f"(--coordinator, --process-count {advice.hosts}, --process-id, or a cluster's own variables).",
            )
    else:
        print_text(console, "\nNothing fits. Use more devices, a smaller model, or shorter examples.")


def _best_table(advice: Advice, top: int, *, show_way: bool) -> Columns:
    speed = "step, s" if advice.tokens is None else "tokens/s"
    names = ("step, s", speed, "bubble", "memory", "moved")
    right = ("", "microbatches", *names)
    table = make_table(
        "", "layout", "schedule", "microbatches", "remat", *dict.fromkeys(names), *[""] * show_way, right=right
    )
    for place, found in enumerate(advice.best[:top], start=1):
        estimate, layout = found.estimate, found.estimate.layout
        cells = [place, _mesh(estimate), layout.order or "-", layout.num_microbatches, layout.remat]
        cells += [f"{estimate.seconds:.4g}"]
        cells += [] if advice.tokens is None else [f"{advice.tokens / estimate.seconds:,.0f}"]
        cells += [f"{estimate.bubble:.1%}", format_bytes(estimate.memory), format_bytes(estimate.moved)]
        cells += [found.how] * show_way
        table.add_row(*cells, style="bold" if place == 1 else "")
    return table


def _family_table(advice: Advice) -> Columns:
    reasons, winner = advice.reasons(), advice.winner
    table = make_table("", "step, s", "against", "why", right=("step, s", "against"), wrap=("why",))
    order = sorted(advice.families, key=lambda f: f.best.seconds if f.best is not None else float("inf"))
    for family in order:
        best = family.best
        step = "-" if best is None else f"{best.seconds:.4g}"
        against = "-" if best is None or winner is None else f"{best.seconds / winner.seconds:.2f} x"
        won = reasons[family.name] == "won"
        table.add_row(family.name, step, against, reasons[family.name], style="bold" if won else "")
    return table


def _mesh(estimate: Estimate) -> str:
    mesh = estimate.layout.mesh
    return mesh.replace("data", "fully sharded") if estimate.layout.is_sharded else mesh


def _words(estimate: Estimate) -> str:
    layout = estimate.layout
    order = f", {layout.order}" if layout.order else ""
    return f"{_mesh(estimate)}{order}, {layout.num_microbatches} microbatches, remat {layout.remat}"


def as_text(found: Confirmed) -> str:
    """A layout in a line, for a phase or a message."""
    return textwrap.shorten(_words(found.estimate), 100)
