"""The progress of a process in its run, readable by its threads and by other processes."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from meshpipe.processes.stop import StopRequest

MIN_SECONDS = 30.0
"""Shortest time that a stop waits for a step."""
FIRST_STEP_SECONDS = 120.0
"""The same for the first step, which opens connections."""
MAX_STEPS = 3.0
"""A stop waits for this many times the longest step so far."""
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Steps:
    """The last step dispatched to the devices, and the last completed."""

    dispatched: int
    completed: int

    def __str__(self) -> str:
        return f"{self.dispatched} {self.completed}"

    @classmethod
    def parse(cls, text: str) -> "Steps":
        dispatched, completed = map(int, text.split())
        return cls(dispatched, completed)


class Progress:
    """The current activity of a run. The training loop calls `dispatched`, `completed` and `during`."""

    def __init__(self, step: int = 0) -> None:
        self.steps = Steps(step, step)
        self.since = time.monotonic()
        """Time of the last progress, on the monotonic clock."""
        self.patience = FIRST_STEP_SECONDS
        """Seconds without progress after which a stop gives up."""
        self.doing = "step"
        self._longest = 0.0

    def made_progress(self) -> None:
        self.since = time.monotonic()

    def dispatched(self, step: int) -> None:
        self.steps = Steps(step, self.steps.completed)

    def completed(self, step: int, seconds: float) -> None:
        self.steps = Steps(self.steps.dispatched, step)
        self._longest = max(self._longest, seconds)
        self.patience = max(MIN_SECONDS, MAX_STEPS * self._longest)
        self.made_progress()

    @contextmanager
    def during(self, what: str, patience: float = math.inf) -> Iterator[None]:
        """Wraps an activity other than steps that may take `patience` seconds without progress."""
        before, self.doing, self.patience = (self.doing, self.patience), what, patience
        self.made_progress()
        try:
            yield
        finally:
            self.made_progress()
            self.doing, self.patience = before


class StopLimit:
    """While entered, calls `fail` with a message when a requested stop makes no progress for too long.

    `others` returns the steps of each process, by its number; it is empty in a run of one process.
    """

    def __init__(
        self,
        progress: Progress,
        stop: StopRequest,
        fail: Callable[[str], object],
        others: Callable[[], Mapping[int, Steps]] = dict,
    ) -> None:
        self._progress, self._stop, self._fail, self._others = progress, stop, fail, others
        self._done = threading.Event()

    def __enter__(self) -> "StopLimit":
        threading.Thread(target=self._watch, name="stop limit", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            progress, received = self._progress, self._stop.signal
            since = max(progress.since, self._stop.at)
            if received is None or time.monotonic() - since < progress.patience:
                continue
            seconds = time.monotonic() - since
            what = f"step {progress.steps.completed + 1}" if progress.doing == "step" else f"the {progress.doing}"
            message = f"{received.name} asked to stop, and {what} has made no progress for {seconds:.0f} s"
            behind = self._behind()
            self._done.set()
            self._fail(f"{message}; {behind}" if behind else message)

    def _behind(self) -> str:
        """Names the processes that hold up the others, judged by their steps."""
        try:
            found = self._others()
        except Exception:  # the coordinator is gone
            return ""
        if len(found) < 2:
            return ""
        least = min(found.values(), key=lambda steps: (steps.dispatched, steps.completed))
        waited_for = [process for process, steps in sorted(found.items()) if steps == least]
        if len(waited_for) == len(found):
            return f"all processes have dispatched step {least.dispatched} and completed step {least.completed}"
        names = ", ".join(map(str, waited_for))
        return f"waiting for process{'es' if len(waited_for) > 1 else ''} {names}, at step {least.dispatched}"
