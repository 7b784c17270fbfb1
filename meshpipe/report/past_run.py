"""A run as its metrics file tells it."""

import json
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meshpipe.layers.reserved_names import RESERVED

METRICS = "metrics.jsonl"
"""The metrics file in the folder of a run."""
UNFINISHED = "unfinished"
"""Status of a run without a last line: it is running, or was killed."""


class PastRunError(ValueError):
    """A run has no metrics that can be read; the message names it and the remedy."""


@dataclass
class PastRun:
    """The steps and evaluations of one run. Where a resumed run repeats a step, the later values count."""

    name: str
    steps: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """The values of each step, in order."""
    evaluations: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """The values of each evaluation, by the step before it."""
    planned_steps: int | None = None
    status: str = UNFINISHED
    """`completed`, `stopped` or `failed`; else `UNFINISHED`."""
    problems: list[str] = field(default_factory=list)
    """Lines that could not be read, each with file, line and reason."""

    def values(self, name: str) -> dict[int, float]:
        """One value of every step that has it; what was not finite is left out."""
        return _values(self.steps, name)

    def held_out(self, name: str = "loss") -> dict[int, float]:
        """One value of every evaluation that has it, by the step before it."""
        return _values(self.evaluations, name)

    def own_names(self, events: Mapping[int, Mapping[str, Any]]) -> set[str]:
        """The names of values in steps or evaluations that layers and metrics chose: terms of the loss, metrics, and
        what layers sow.
        """
        names = {name for values in events.values() for name in values if _is_number(values[name])}
        return {name for name in names - RESERVED if name.isprintable()}

    @property
    def unit(self) -> str:
        """What the throughput counts."""
        return "tokens" if self.values("tokens_per_s") else "examples"

    @property
    def throughput(self) -> float | None:
        """The median over all steps, so that slow first steps do not count."""
        rates = self.values(f"{self.unit}_per_s")
        return statistics.median(rates.values()) if rates else None

    @property
    def seconds(self) -> float:
        """The time of all steps."""
        return sum(self.values("step_time_s").values())

    def add(self, event: Mapping[str, Any]) -> None:
        """Takes the next event of the file. Raises `ValueError` for one that no run writes."""
        kind = event.get("event")
        step = event.get("step")
        if kind not in ("start", "step", "eval", "end"):
            raise ValueError(f"its event is {kind!r:.40}")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"its step is {step!r:.40}")
        if kind == "start":
            self.status = UNFINISHED
            config = event.get("config")
            planned = config.get("steps") if isinstance(config, dict) else None
            self.planned_steps = planned if isinstance(planned, int) else None
            # A resumed run continues here; what came after in the earlier run does not belong to it.
            self.steps = {n: values for n, values in self.steps.items() if n <= step}
            self.evaluations = {n: values for n, values in self.evaluations.items() if n <= step}
        elif kind == "end":
            self.status = str(event.get("status"))
        else:
            (self.steps if kind == "step" else self.evaluations)[step] = event


def read_run(run: Path, name: str | None = None) -> PastRun:
    """The run in a metrics file, or in the folder of a run.

    Lines that cannot be read are left out, and listed in `problems`. Raises `PastRunError` when nothing can be read.
    """
    file = run / METRICS if os.path.isdir(run) else run
    found = PastRun(name or str(run))
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError("it is unfinished, as when a run is writing it or was killed")
                    event = json.loads(line)
                    if not isinstance(event, dict):
                        raise ValueError("it is no JSON object")
                    found.add(event)
                except (ValueError, RecursionError) as error:
                    found.problems.append(f"{file}, line {number} is left out: {_why(error)}.")
    except OSError as error:
        if not run.exists():
            raise PastRunError(f"There is no run at {run}. Give a --run-dir or a metrics file.") from error
        missing = " A folder must be the --run-dir of a run." if run.is_dir() else ""
        message = f"A run is a metrics file, or the folder of a run. Got {file}: {error.strerror}.{missing}"
        raise PastRunError(message) from error
    if not found.steps and not found.evaluations:
        first = f" {found.problems[0]}" if found.problems else ""
        raise PastRunError(f"A metrics file must have at least one step. Got {file}, which has none.{first}")
    return found


def _values(events: Mapping[int, Mapping[str, Any]], name: str) -> dict[int, float]:
    return {step: float(values[name]) for step, values in events.items() if _is_number(values.get(name))}


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON ({error.msg}, column {error.colno})"
    return "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
