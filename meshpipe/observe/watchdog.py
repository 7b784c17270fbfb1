"""Ends a run whose step does not end, and says what each rank is waiting for."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax

from meshpipe.observe.probe import probe
from meshpipe.plan.lower import Compute, Transfer
from meshpipe.plan.plan import Plan
from meshpipe.sharding import Arrays

POLL_SECONDS = 0.25


class Watchdog:
    """A context that calls `fail` with a message when no step has ended for `timeout` seconds; 0 watches nothing.

    It observes steps and holds a few bytes of every action until the next step, to see which of them are not ready. The
    first step has no limit, since compiling and connecting may take long.
    """

    def __init__(self, plan: Plan, timeout: float, fail: Callable[[str], object]) -> None:
        self._plan, self._timeout, self._fail = plan, timeout, fail
        self._seen: list[tuple[Compute | Transfer, jax.Array | None]] = []
        self._done = threading.Event()
        self._last_end: float | None = None

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def begin_step(self) -> None:
        self._seen = []

    def end_step(self) -> None:
        self._last_end = time.monotonic()

    def observe(self, instruction: Compute | Transfer, made: Arrays, added: Arrays) -> None:
        """To be called after each dispatch."""
        self._seen.append((instruction, probe(made)))

    def waiting(self) -> list[str]:
        """For each rank of this process, the action that it is waiting in, and which inputs of it have not arrived."""
        lines: dict[int, str] = {}
        ranks = {instruction.rank for instruction, _ in self._seen if isinstance(instruction, Compute)}
        missing = {i.target: i for i, array in self._seen if isinstance(i, Transfer) and not _is_there(array)}
        for instruction, array in self._seen:
            if isinstance(instruction, Compute) and instruction.rank not in lines and not _is_there(array):
                action = instruction.action
                line = f"rank {instruction.rank} waits in {action} ({action.op.meaning} of stage {action.stage}, "
                line += f"microbatch {action.microbatch})"
                absent = [missing[buffer] for buffer in instruction.reads if buffer in missing]
                lines[instruction.rank] = line + "".join(f", for {t.target} from rank {t.source_rank}" for t in absent)
        return [lines.get(rank, f"rank {rank} has done what it was given") for rank in sorted(ranks)]

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            if self._last_end is None or time.monotonic() - self._last_end < self._timeout:
                continue
            waiting = self.waiting() or ["no rank of this process was given anything to do"]
            message = f"no step has ended for {self._timeout:g} s: {'; '.join(waiting)}"
            print(f"meshpipe: {message}.", file=sys.stderr, flush=True)
            self._done.set()
            self._fail(message)


def _is_there(array: Any) -> bool:
    """An action that leaves nothing to wait for (it only accumulates gradients) counts as done when the next one is."""
    try:
        return array is None or bool(array.is_ready())
    except RuntimeError:  # deleted, so somebody has taken it over
        return True
