"""What people see of a run while it trains: a plain line every few steps, and below them a live one on a terminal."""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 30.0
"""Longest time between plain lines, if steps are not longer."""
MAX_TIME = 10**9
"""Upper limit of the displayed time left, in seconds."""


class ProgressLine:
    """Shows step, loss, throughput and time left in a plain line every few steps; its times are means since the line
    before. On a terminal, a live line below them shows every step; it disappears at the end, and the plain lines stay.
    """

    def __init__(self, console: Console, steps: int, start: int = 0) -> None:
        self.console = console
        self._steps = steps
        self._every = lines_every(steps - start)
        self._last_line = time.monotonic()
        self._seconds_per_step: float | None = None
        self._steps_since, self._seconds_since, self._work_since = 0, 0.0, 0.0
        """Since the last plain line: steps, their time, and the tokens or examples in them."""
        self._bar: Progress | None = None
        if console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None):
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(24),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def step(self, values: Mapping[str, Any], terms: Sequence[str] = ()) -> None:
        """Shows the `values` of one step event; `terms` names those that layers add to the loss."""
        step, seconds = values["step"], values["step_time_s"]
        # The first step is slower than the others; the moving average forgets it quickly.
        before = seconds if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = before + 0.3 * (seconds - before)
        left = timedelta(seconds=min(MAX_TIME, round(self._seconds_per_step * (self._steps - step))))
        self._steps_since += 1
        self._seconds_since += seconds
        self._work_since += values[_rate_of(values)] * seconds
        loss = "  ".join(f"{name} {values[name]:.4f}" for name in ("loss", *terms))
        if self._bar is not None:
            text = f"{loss}  {seconds:.3g} s/step  {speed(values)}  {left} left"
            self._bar.update(self._task, completed=step, description=text)
        if self._is_due(step):
            mean = self._seconds_since / self._steps_since
            rate = speed({_rate_of(values): self._work_since / self._seconds_since})
            self.say(f"step {step}/{self._steps}  {loss}  {mean:.3g} s/step  {rate}  {left} left")
            self._last_line = time.monotonic()
            self._steps_since, self._seconds_since, self._work_since = 0, 0.0, 0.0

    def _is_due(self, step: int) -> bool:
        late = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        return step == 1 or step == self._steps or step % self._every == 0 or late

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def lines_every(steps: int) -> int:
    """Steps between plain lines: about fifteen in a run, but at least one every hundred steps."""
    for every in (1, 2, 5, 10, 20, 50):
        if every * 15 >= steps:
            return every
    return 100


def speed(values: Mapping[str, Any]) -> str:
    """The throughput: tokens per second if the model has tokens, else examples per second."""
    name = _rate_of(values)
    return f"{values[name]:,.0f} {name.removesuffix('_per_s')}/s"


def _rate_of(values: Mapping[str, Any]) -> str:
    return "tokens_per_s" if "tokens_per_s" in values else "examples_per_s"
