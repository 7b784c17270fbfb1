"""Verify follows what layers add to the loss, and finds it counted too often."""

import experts
import jax
import optax
import pytest
from flax import nnx

import meshpipe.layers.stage_function
from meshpipe import PipelineConfig, make_mesh, verify

LAYERS = [experts.Embed, experts.BalancedByLoss, experts.BalancedByLoss, experts.Head]
BATCHES = experts.batches(2)


class Uncut(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([layer(rngs) for layer in LAYERS])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def report(reference=None):
    return verify(
        LAYERS,
        experts.loss,
        optax.adam(1e-2),
        batches=BATCHES,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
        reference=reference,
    )


@pytest.mark.parametrize("reference", [None, pytest.param(Uncut, marks=pytest.mark.slow)])
def test_a_right_term_passes(reference):
    found = report(reference)
    assert found.ok, found.first
    assert {"term balance", "uninterrupted term balance"} <= {d.quantity for d in found.differences}


@pytest.mark.slow
def test_a_term_whose_gradient_counts_once_per_stage_is_found(monkeypatch):
    """Its value is reported right."""
    original = meshpipe.layers.stage_function.objective_of

    def twice(sums):
        return original({name: 2 * value if name == "terms/balance" else value for name, value in sums.items()})

    monkeypatch.setattr(meshpipe.layers.stage_function, "objective_of", twice)
    wrong = {d.quantity for d in report().differences if not d.ok}
    assert "gradient" in wrong
    assert "term balance" not in wrong


@pytest.mark.slow
@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_a_term_that_is_summed_or_averaged_over_microbatches_is_found(monkeypatch, factor):
    original = meshpipe.layers.stage_function.sums_of_sown

    def wrong_sums(*arguments):
        return {name: factor * value for name, value in original(*arguments).items()}

    monkeypatch.setattr(meshpipe.layers.stage_function, "sums_of_sown", wrong_sums)
    wrong = {d.quantity for d in report().differences if not d.ok and d.update == 1}
    assert {"gradient", "term balance"} <= wrong
    assert "loss" not in wrong


@pytest.mark.slow
def test_a_term_without_a_gradient_is_found(monkeypatch):
    monkeypatch.setattr(meshpipe.layers.stage_function, "objective_of", lambda sums: sums.get("loss"))
    found = report()
    assert not found.ok
    assert found.first.quantity in ("gradient", "gradient norm")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_stage_whose_only_gradient_is_that_of_a_term(schedule):
    found = verify(
        [experts.Embed, experts.BalancedByLoss, jax.lax.stop_gradient, experts.Head],
        experts.loss,
        optax.sgd(0.1),
        batches=BATCHES,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2, schedule=schedule),
    )
    assert found.ok, found.first


@pytest.mark.slow
def test_a_term_of_a_frozen_stage_is_reported_and_trains_nothing():
    pipeline = PipelineConfig(num_microbatches=2)
    options = {"trainable": ["layers/3/*"], "mesh": make_mesh(2), "pipeline": pipeline}
    found = verify(LAYERS, experts.loss, optax.sgd(0.1), batches=BATCHES, **options)
    assert found.ok, found.first
    assert "term balance" in {d.quantity for d in found.differences}
