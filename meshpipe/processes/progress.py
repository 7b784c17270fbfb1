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
    """The last step that was handed over to the devices, and the last that has ended."""

    handed_over: int
    ended: int

    def __str__(self) -> str:
        return f"{self.handed_over} {self.ended}"

    @classmethod
    def parse(cls, text: str) -> "Steps":
        handed_over, ended = map(int, text.split())
        return cls(handed_over, ended)


class Progress:
    """What a run is at. Whoever runs it calls `handed_over`, `ended` and `during`."""

    def __init__(self, step: int = 0) -> None:
        self.steps = Steps(step, step)
        self.since = time.monotonic()
        """When it last came on."""
        self.patience = FIRST_STEP_SECONDS
        """Seconds that it may take to come on again before a stop gives it up."""
        self.doing = "step"
        self._longest = 0.0

    def came_on(self) -> None:
        self.since = time.monotonic()

    def handed_over(self, step: int) -> None:
        self.steps = Steps(step, self.steps.ended)

    def ended(self, step: int, seconds: float) -> None:
        self.steps = Steps(self.steps.handed_over, step)
        self._longest = max(self._longest, seconds)
        self.patience = max(LEAST_SECONDS, LONGEST_STEPS * self._longest)
        self.came_on()

    @contextmanager
    def during(self, what: str, patience: float = math.inf) -> Iterator[None]:
        """Around something else than steps, which may take `patience` seconds to come on."""
        before, self.doing, self.patience = (self.doing, self.patience), what, patience
        self.came_on()
        try:
            yield
        finally:
            self.came_on()
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
            what = f"step {progress.steps.ended + 1}" if progress.doing == "step" else f"the {progress.doing}"
            message = f"{received.name} asked to stop, and {what} has not come on for {seconds:.0f} s"
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
        least = min(found.values(), key=lambda steps: (steps.handed_over, steps.ended))
        waited_for = [process for process, steps in sorted(found.items()) if steps == least]
        if len(waited_for) == len(found):
            return f"all processes have handed over step {least.handed_over} and ended step {least.ended}"
        names = ", ".join(map(str, waited_for))
        return f"waiting for process{'es' if len(waited_for) > 1 else ''} {names}, at step {least.handed_over}"
