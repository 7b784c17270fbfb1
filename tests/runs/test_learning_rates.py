"""The learning rate that metrics give of each update."""

import pytest

from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.runs.learning_rates import RATES_AT_ONCE, LearningRates


@pytest.mark.parametrize("optimizer", [OptimizerConfig(warmup_steps=5, decay="cosine"), OptimizerConfig()])
def test_learning_rates_are_those_of_the_schedule(optimizer: OptimizerConfig) -> None:
    """Even when a run resumes in the middle of a block of rates, or goes back."""
    steps = 3 * RATES_AT_ONCE
    rates, schedule = LearningRates(optimizer.schedule(steps)), optimizer.schedule(steps)
    for updates in (7, 8, RATES_AT_ONCE - 1, RATES_AT_ONCE, 2 * RATES_AT_ONCE + 5, 0, steps):
        assert rates.after(updates) == pytest.approx(float(schedule(updates)), rel=1e-6)
