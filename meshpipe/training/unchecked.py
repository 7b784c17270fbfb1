"""Steps that are not yet known to be finite, kept so that the first bad one can be run again."""

from collections import deque

import jax

from meshpipe.layers.microbatches import OwnBatch
from meshpipe.sharding import local_value

STEPS_AHEAD = 32
"""Steps that may be dispatched before the first of them is done: each keeps a batch in memory."""


class UncheckedSteps:
    """The steps since the last that is known to be good, each with its batch."""

    def __init__(self) -> None:
        self._steps: deque[tuple[int, jax.Array, OwnBatch]] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: int, good: jax.Array, batch: OwnBatch) -> None:
        """Remembers a step, and forgets those that are done and were good.

        It does not wait, unless `STEPS_AHEAD` steps are not done.
        """
        if len(self._steps) >= STEPS_AHEAD:
            jax.block_until_ready(self._steps[0][1])
        while self._oldest_is_done() and local_value(self._steps[0][1]):
            self._steps.popleft()
        if not self._oldest_is_done():  # if done, it is bad, and the steps after it will be run again
            self._steps.append((step, good, batch))

    def first_bad(self) -> tuple[int, OwnBatch] | None:
        """The first step that was not finite, and its batch; waits for the steps before it."""
        return next(((step, batch) for step, good, batch in self._steps if not local_value(good)), None)

    def clear(self) -> None:
        self._steps.clear()

    def _oldest_is_done(self) -> bool:
        return bool(self._steps) and self._steps[0][1].is_ready()  # type: ignore[attr-defined]
