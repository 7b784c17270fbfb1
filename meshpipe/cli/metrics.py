"""`meshpipe metrics`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from meshpipe.cli.arguments import parse
from meshpipe.files import expand_fields, expanded
from meshpipe.processes.exit_codes import COMPLETED

MAX_PROBLEMS = 5
"""Lines of one run that are reported one by one when they cannot be read."""


@dataclass(frozen=True)
class _MetricsFlags:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN...", help_behavior_hint="")]
    """Metrics files, or folders of runs (--run-dir)."""
    plot: Path | None = None
    """Draw loss, gradient norm and throughput to this file; the suffix selects the format."""
    smooth: float = 0.0
    """Smoothing of the curves of --plot: the share of the running mean that each step keeps, e.g. 0.9; 0 is none."""

    def __post_init__(self) -> None:
        expand_fields(self, "plot")

    def check(self) -> None:
        """Raises `ValueError` for no run, and for smoothing out of range or without curves."""
        if not self.runs:
            raise ValueError("metrics needs at least one RUN: a metrics file, or the folder of a run. Got none.")
        if not 0 <= self.smooth < 1:
            raise ValueError(f"--smooth must be at least 0 and below 1. Got {self.smooth}.")
        if self.smooth and self.plot is None:
            raise ValueError(f"--smooth is for the curves of --plot. Got {self.smooth} alone. Add --plot FILE.png.")


def metrics(arguments: list[str]) -> int:
    """Compares runs by their metrics files; lines that cannot be read are reported on standard error."""
    flags = parse(_MetricsFlags, arguments, "meshpipe metrics", "Shows the metrics of runs, and compares them.")
    flags.check()
    from meshpipe.report.curves import draw_curves
    from meshpipe.report.past_run import read_run
    from meshpipe.report.picture import check_picture
    from meshpipe.report.run_table import run_table, short_names
    from meshpipe.report.tables import count_of, make_console

    if flags.plot is not None:
        check_picture(flags.plot)
    paths = [expanded("RUN", path) for path in flags.runs]
    runs = [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]
    console = make_console()
    console.print(run_table(runs, console.width))
    for run in runs:
        for problem in run.problems[:MAX_PROBLEMS]:
            print(f"meshpipe: {problem}", file=sys.stderr)
        if len(run.problems) > MAX_PROBLEMS:
            more = count_of(len(run.problems) - MAX_PROBLEMS, "more line")
            print(f"meshpipe: {more} of {run.name} could not be read.", file=sys.stderr)
    if flags.plot is not None:
        draw_curves(runs, flags.plot, flags.smooth)
        console.print(f"Drawn to {flags.plot}.", markup=False)
    return COMPLETED
