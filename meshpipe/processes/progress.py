"""How far a process has come with its run, for its threads and for the other processes to read."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from meshpipe.processes.stop import StopRequest

LEAST_SECONDS = 30.0
"""How long a stop waits for a step, at least."""
FIRST_STEP_SECONDS = 120.0
"""The same for the first step, which opens connections."""
LONGEST_STEPS = 3.0
"""How many times the longest step so far it waits otherwise."""
POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Steps:
    """The last step that was handed over to the devices, and the last that has completed."""

    dispatched: int
    completed: int

    def __str__(self) -> str:
        return f"{self.dispatched} {self.completed}"

    @classmethod
    def parse(cls, text: str) -> "Steps":
        dispatched, completed = map(int, text.split())
        return cls(dispatched, completed)


class Progress:
    """What a run is at. Whoever runs it calls `dispatched`, `completed` and `during`."""

    def __init__(self, step: int = 0) -> None:
        self.steps = Steps(step, step)
        self.since = time.monotonic()
        """When it last came on."""
        self.patience = FIRST_STEP_SECONDS
        """Seconds that it may take to come on again before a stop gives it up."""
        self.doing = "step"
        self._longest = 0.0

    def made_progress(self) -> None:
        self.since = time.monotonic()

    def dispatched(self, step: int) -> None:
        self.steps = Steps(step, self.steps.completed)

    def completed(self, step: int, seconds: float) -> None:
        self.steps = Steps(self.steps.dispatched, step)
        self._longest = max(self._longest, seconds)
        self.patience = max(LEAST_SECONDS, LONGEST_STEPS * self._longest)
        self.made_progress()

    @contextmanager
    def during(self, what: str, patience: float = math.inf) -> Iterator[None]:
        """Around something else than steps, which may take `patience` seconds to come on."""
        before, self.doing, self.patience = (self.doing, self.patience), what, patience
        self.made_progress()
        try:
            yield
        finally:
            self.made_progress()
            self.doing, self.patience = before


class StopLimit:
    """While entered, a stop that was asked for and does not come about ends the process, by `fail` with a message.

    `others` tells how far each process has come, if there are several, by number.
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
        """Which processes are waited for, as far as steps tell."""
        try:
            found = self._others()
        except Exception:  # nobody is there to ask
            return ""
        if len(found) < 2:
            return ""
        least = min(found.values(), key=lambda steps: (steps.dispatched, steps.completed))
        waited_for = [process for process, steps in sorted(found.items()) if steps == least]
        if len(waited_for) == len(found):
            return f"all processes have dispatched step {least.dispatched} and completed step {least.completed}"
        names = ", ".join(map(str, waited_for))
        return f"waiting for process{'es' if len(waited_for) > 1 else ''} {names}, at step {least.dispatched}"
