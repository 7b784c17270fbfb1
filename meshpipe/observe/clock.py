"""Measures when each action and transfer of a step ran."""

import time
from collections import deque
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from meshpipe.observe.probe import smallest
from meshpipe.pipeline.executor import Executor, Sums
from meshpipe.plan.lower import Buffer, Compute, Transfer
from meshpipe.plan.plan import Action, Plan
from meshpipe.plan.simulate import Timeline
from meshpipe.sharding import Arrays

MAX_WAITING = 8
"""Most results of one rank that may be unfinished at once: enough to keep its devices busy, and few to hold in
memory."""


@dataclass(frozen=True)
class MeasuredStep:
    """One measured step, in seconds from its first dispatch."""

    timeline: Timeline
    """Of the ranks that live here."""
    transfers: Mapping[Transfer, tuple[float, float]]
    """Start and end of each, of those that end here."""
    begin: float
    """`time.perf_counter()` of that dispatch."""


class StepClock:
    """Observes a step and times it without delaying it: one thread per rank waits for its results in turn.

    JAX reports when an array is ready, not when its computation began. So an action counts as started once the action
    before it on its rank has ended, its inputs have arrived, and it has been dispatched. That is its true start where a
    device runs one program at a time.
    """

    def __init__(self, plan: Plan, added: Iterable[Arrays]):
        """`added` has examples of the arrays that actions accumulate into; probes for them are compiled before the
        step.
        """
        self._plan = plan
        for arrays in added:
            if arrays:
                jax.block_until_ready(_copy(smallest(arrays)))
        self._lanes: dict[Hashable, _Lane] = {}
        self._seen: list[tuple[Compute | Transfer, float, Future[float] | None]] = []
        self._begin = self._dispatch = time.perf_counter()

    def observe(self, instruction: Compute | Transfer, made: Arrays, added: Arrays) -> None:
        """To be called after each dispatch, in the order of the program."""
        # What an action adds to is handed over to the next one at once; a copy of the smallest is ready just after it.
        array = smallest(made) if made else _copy(smallest(added)) if added else None
        end = None if array is None else self._lane(instruction).submit(array)
        self._seen.append((instruction, self._dispatch, end))
        self._dispatch = time.perf_counter()

    def finish(self) -> MeasuredStep:
        """Waits until the step has ended."""
        starts: dict[Action, float] = {}
        ends: dict[Action, float] = {}
        transfers: dict[Transfer, tuple[float, float]] = {}
        ready: dict[Buffer, float] = {}
        free_at: dict[int, float] = {}
        for instruction, dispatch, future in self._seen:
            reads = (instruction.source,) if isinstance(instruction, Transfer) else instruction.reads
            start = max(dispatch - self._begin, *(ready.get(buffer, 0.0) for buffer in reads), 0.0)
            if isinstance(instruction, Compute):
                start = max(start, free_at.get(instruction.rank, 0.0))
            if isinstance(instruction, Transfer) and future is None:  # it ends elsewhere
                continue
            # A result that was ready before its thread looked has an end that is a little late, never early.
            end = start if future is None else max(start, future.result() - self._begin)
            if isinstance(instruction, Transfer):
                transfers[instruction] = start, end
                ready[instruction.target] = end
                continue
            starts[instruction.action], ends[instruction.action] = start, end
            free_at[instruction.rank] = end
            ready.update(dict.fromkeys(instruction.writes, end))
        for lane in self._lanes.values():
            lane.close()
        return MeasuredStep(Timeline(self._plan, starts, ends), transfers, self._begin)

    def _lane(self, instruction: Compute | Transfer) -> "_Lane":
        """The thread that waits for what this rank computes, or receives from one side."""
        key: Hashable = instruction.rank if isinstance(instruction, Compute) else _side(instruction)
        if key not in self._lanes:
            self._lanes[key] = _Lane()
        return self._lanes[key]


def measure_step(
    executor: Executor, params: Mapping[int, Arrays], state: Mapping[int, Arrays], inputs: Mapping[int, Arrays]
) -> tuple[dict[int, Arrays], dict[int, Arrays], Sums, MeasuredStep]:
    """Runs a step, waits for it, and returns what `Executor.run` returns and when each action and transfer ran."""
    examples = executor.accumulators()
    jax.block_until_ready((params, state, inputs, examples))
    clock = StepClock(executor.plan, examples)
    gradients, after, sums = executor.run(params, state, inputs, clock.observe)
    return gradients, after, sums, clock.finish()


def _side(transfer: Transfer) -> tuple[int, int, str]:
    return transfer.source_rank, transfer.target_rank, transfer.target.kind


class _Lane:
    """A thread that records in turn when arrays are ready, and holds few of them."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "clock")
        self._waiting: deque[Future[float]] = deque()

    def submit(self, array: jax.Array) -> Future[float]:
        """The time at which the array is ready; waits while `MAX_WAITING` others are not."""
        while len(self._waiting) >= MAX_WAITING:
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(_ready_time, array))
        return self._waiting[-1]

    def close(self) -> None:
        self._thread.shutdown()


_copy = jax.jit(jnp.copy)


def _ready_time(array: jax.Array) -> float:
    jax.block_until_ready(array)
    return time.perf_counter()
