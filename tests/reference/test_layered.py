"""Plain training of layers that are no chain is what the same model is when it is written by hand."""

import graph_models
import jax
import numpy as np
import optax
import pytest
from graph_models import MODELS, plain_loss_and_gradients

from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.wiring import wire
from meshpipe.reference.layered import LayeredModel
from meshpipe.reference.plain import PlainTraining, Values

QUICK = ("encoder-decoder", "only the loss")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_plain_training_follows_the_graph(name: str) -> None:
    model, (batch,) = MODELS[name], graph_models.batches(1)
    layers = abstract_layers(model.layers(), batch)
    wiring = wire(layers, model.loss, None, input="inputs", fields=batch)
    plain = LayeredModel(layers, wiring, seed=0, tied=())
    # In-batch negatives are those of a microbatch.
    plain.splits |= name == "two towers"
    training = PlainTraining(plain, model.loss, optax.sgd(1.0), seed=0, num_microbatches=4, clip_norm=None)
    found = training.gradients(Values(plain.initial, {}, optax.sgd(1.0).init(plain.initial)), batch, 0)
    loss, gradients = plain_loss_and_gradients(model, jax.device_get(plain.initial), batch)
    assert found.loss == pytest.approx(float(loss), rel=1e-6)
    assert found.gradients.keys() == gradients.keys()
    for path, gradient in gradients.items():
        np.testing.assert_allclose(found.gradients[path], gradient, rtol=2e-5, atol=1e-7)
        assert np.abs(gradient).max() > 1e-4, path
