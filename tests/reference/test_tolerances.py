"""What counts as a difference, and of which size."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meshpipe.reference.comparison import Comparison
from meshpipe.reference.plain import LossInputs, PlainTraining, Values


def only(comparison):
    (difference,) = comparison.differences
    return difference


def test_a_difference_in_the_imaginary_part_is_one():
    comparison = Comparison(1e-4)
    comparison.leaves(1, "gradient", {"a": np.complex64([1 + 1j])}, {"a": np.complex64([1 + 2j])})
    assert only(comparison).found == pytest.approx(1.0)
    assert not only(comparison).ok


def test_nan_is_a_difference():
    comparison = Comparison(1e-4)
    comparison.leaves(1, "gradient", {"a": np.float32([np.nan])}, {"a": np.float32([1])})
    comparison.changes(1, "parameter", *({"b": np.float32([value])} for value in (np.nan, 1, 1)))
    assert [d.ok for d in comparison.differences] == [False, False]


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.int32])
def test_a_lost_change_is_a_difference_even_if_it_is_small(dtype):
    before = np.asarray([1, 2], dtype)
    after = before + np.asarray([0, {np.float32: 1e-5, jnp.bfloat16: 0.125, np.int32: 1}[dtype]], dtype)
    for found, ok in ((before, False), (after, True)):
        comparison = Comparison(3.5e-4)
        comparison.changes(1, "parameter", {"a": found}, {"a": after}, {"a": before})
        assert only(comparison).ok == ok


def test_no_more_is_allowed_for_a_change_than_for_a_value():
    before, after = {"a": np.float32([1e6])}, {"a": np.float32([1])}
    comparison = Comparison(1e-3)
    comparison.changes(1, "parameter", after, after, before)
    assert only(comparison).allowed == pytest.approx(1e-3)


class Rotation:
    """A plain model with one complex parameter."""

    def __init__(self):
        self.names = {"layers/0/angle": "layers/0/angle"}
        self.trained = frozenset(self.names)
        self.kept, self.initial = {}, {}
        self.splits = False

    def run(self, params, state, batch, draws):
        return LossInputs(batch["inputs"] * params["layers/0/angle"], {}, {}), {}

    def after_step(self, params, state):
        return {}

    def describe(self):
        return "a rotation"


def test_the_norm_of_complex_gradients_counts_both_parts():
    def loss(output, batch):
        return (3 * output.real + 4 * output.imag).sum(), output.size

    training = PlainTraining(Rotation(), loss, optax.sgd(1.0), seed=0, num_microbatches=1, clip_norm=None)
    values = Values({"layers/0/angle": jnp.complex64(1 + 1j)}, {}, optax.sgd(1.0).init({}))
    found = training.gradients(values, {"inputs": np.ones(2, np.float32)}, 0)
    assert found.norm == pytest.approx(5.0)
    assert abs(found.gradients["layers/0/angle"]) == pytest.approx(5.0)
