"""The trace file of a run: its last timed steps, with a picture of the first next to it."""

from pathlib import Path

from meshpipe.observe.clock import MeasuredStep
from meshpipe.observe.trace import write_trace
from meshpipe.processes.coordination import process_index
from meshpipe.report.picture import Panel, draw_timelines
from meshpipe.runs.warning import Warnings

MAX_TRACE = 10
"""Number of timed steps in a trace; older ones are dropped."""


class TraceFile:
    """Rewritten after each timed step. Each process writes its own file, for its own ranks."""

    def __init__(self, path: str, warnings: Warnings) -> None:
        self._file = Path(path)
        if process_index():
            self._file = self._file.with_suffix(f".process{process_index()}.json")
        self._steps: dict[int, MeasuredStep] = {}
        self._warnings = warnings

    def add(self, step: int, measured: MeasuredStep) -> None:
        """Never raises; warns once if the trace cannot be written."""
        is_first = not self._steps
        self._steps[step] = measured
        if len(self._steps) > MAX_TRACE:
            del self._steps[min(self._steps)]
        try:
            write_trace(self._file, self._steps)
            if is_first:
                timeline = measured.timeline
                panel = Panel(timeline, f"{timeline.plan.schedule}, step {step}", in_seconds=True)
                draw_timelines([panel], self._file.with_suffix(".png"))
        except Exception as error:  # from the file system, or from Matplotlib
            self._warnings.say_once("trace", f"the trace could not be written: {error}. The run continues without it.")
