"""Metrics of a step that the loop adds to those of the trainer."""

from types import SimpleNamespace

import numpy as np
import pytest

from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.run.loop import RATES_AT_ONCE, Loop


@pytest.mark.parametrize("optimizer", [OptimizerConfig(warmup_steps=5, decay="cosine"), OptimizerConfig()])
def test_learning_rates_are_those_of_the_schedule(optimizer: OptimizerConfig) -> None:
    """Even when a run resumes in the middle of a block of rates, or goes back."""
    steps = 3 * RATES_AT_ONCE
    loop = SimpleNamespace(_rates=(0, np.zeros(0)), _config=SimpleNamespace(optimizer=optimizer, steps=steps))
    schedule = optimizer.schedule(steps)
    for updates in (7, 8, RATES_AT_ONCE - 1, RATES_AT_ONCE, 2 * RATES_AT_ONCE + 5, 0, steps):
        assert Loop._learning_rate(loop, updates) == pytest.approx(float(schedule(updates)), rel=1e-6)
