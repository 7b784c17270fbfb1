"""Steps are remembered until they are known to be finite, and no longer."""

import jax.numpy as jnp

from meshpipe.layers.microbatches import OwnBatch
from meshpipe.training.unchecked import UncheckedSteps

GOOD, BAD = jnp.bool_(True), jnp.bool_(False)
BATCH = OwnBatch()


def test_good_steps_are_forgotten_and_the_first_bad_one_is_found() -> None:
    steps = UncheckedSteps()
    steps.add(1, GOOD, BATCH)
    steps.add(2, GOOD, BATCH)
    assert len(steps) == 1
    assert steps.first_bad() is None
    steps.add(3, BAD, BATCH)
    steps.add(4, GOOD, BATCH)
    assert len(steps) == 1  # none after a bad one counts
    assert steps.first_bad() == (3, BATCH)
    steps.clear()
    assert steps.first_bad() is None
