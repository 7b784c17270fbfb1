"""Where the events of a run go: the metrics file, and trackers."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from meshpipe.runs.metrics import MetricsFile
from meshpipe.runs.trackers import Tracker
from meshpipe.runs.warning import Warnings

GROUPS = {"step": "train", "eval": "eval"}
"""The prefix of the names that trackers show, by event."""


class Journal:
    """Gives each event a time stamp, and writes it to the file and to the trackers. `also` is called with every event.

    A tracker that fails is left out from then on, with one warning; the run continues.
    """

    def __init__(
        self,
        file: MetricsFile,
        trackers: Sequence[Tracker] = (),
        *,
        also: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._file, self._trackers, self._also = file, list(trackers), also
        self._warnings = Warnings()

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        values = {**values, "time": time.time()}
        if self._also is not None:
            self._also(event, values)
        self._file.write(event, values)
        if event in GROUPS and self._trackers:
            scalars = dict(_scalars(f"{GROUPS[event]}/", values))
            for tracker in tuple(self._trackers):
                try:
                    tracker.log(values["step"], scalars)
                except Exception as error:
                    self._trackers.remove(tracker)
                    self._warn(tracker, error)

    def end_trackers(self, status: str) -> None:
        for tracker in self._trackers:
            try:
                tracker.end(status)
            except Exception as error:
                self._warn(tracker, error)
        self._trackers.clear()

    def _warn(self, tracker: Tracker, error: Exception) -> None:
        name = type(tracker).__name__
        self._warnings.say_once(name, f"{name} failed: {error}. The run continues without it.")


def _scalars(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The finite numbers by name; the elements of a list by name and index. Step and time are no values."""
    for name, value in values.items():
        if isinstance(value, list | tuple):
            yield from _scalars(f"{prefix}{name}/", {str(index): part for index, part in enumerate(value)})
        elif name not in ("step", "time") and _is_finite(value):
            yield f"{prefix}{name}", float(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
