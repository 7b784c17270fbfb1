"""The learning rate of each update, for the metrics."""

import jax
import numpy as np
import optax

RATES_AT_ONCE = 1024
"""Learning rates that are computed together."""


class LearningRates:
    """The schedule's learning rate by the number of updates before.

    Computes many at once: on an accelerator, each computation waits for all work dispatched before.
    """

    def __init__(self, schedule: optax.Schedule) -> None:
        self._schedule = schedule
        self._rates: tuple[int, np.ndarray] = (0, np.zeros(0))

    def after(self, updates: int) -> float:
        first, rates = self._rates
        if not first <= updates < first + len(rates):
            first = updates - updates % RATES_AT_ONCE
            rates = np.asarray(jax.vmap(self._schedule)(np.arange(first, first + RATES_AT_ONCE)))
            self._rates = first, rates
        return float(rates[updates - first])
