"""The modules of a list of layers as one module, which follows the graph."""

from typing import Any

import graph_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from graph_models import MODELS, plain_loss_and_gradients

from meshpipe import assemble, call, named, with_fields

BATCH = graph_models.batches(1)[0]


def ready(layers: list[Any]) -> list[nnx.Module]:
    made = []
    for index, layer in enumerate(layers):
        constructor = getattr(layer, "layer", layer)
        made.append(constructor(rngs=nnx.Rngs(index)))
    return made


def test_it_is_a_module_that_follows_the_graph() -> None:
    model = MODELS["encoder-decoder"]
    whole = assemble(model.layers(), ready(model.layers()))

    def loss(whole: Any) -> jax.Array:
        output, outputs = whole.outputs(BATCH)
        total, weight = model.loss(output, BATCH)
        assert set(outputs) == {"memory"}
        return total / weight

    found, gradients = nnx.jit(nnx.value_and_grad(loss))(whole)
    params = {"/".join(map(str, key)): v.get_value() for key, v in nnx.to_flat_state(nnx.state(whole, nnx.Param))}
    expected, plain = plain_loss_and_gradients(model, params, BATCH)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    for key, gradient in nnx.to_flat_state(gradients):
        np.testing.assert_allclose(gradient.get_value(), plain["/".join(map(str, key))], rtol=2e-5, atol=1e-7)


def test_calls_get_mode_fields_and_a_random_stream() -> None:
    def function(module: Any, x: Any, memory: Any, scale: Any, *, train: bool, rngs: nnx.Rngs) -> Any:
        return module(x) + 10 * memory + scale + (100 if train else 0) + 0 * rngs.dropout.uniform()

    layers = [named("memory", jnp.square), with_fields(call(nnx.relu, function), memory="memory", scale="other")]
    batch = {"inputs": jnp.ones(2), "other": jnp.full(2, 3.0)}
    whole = assemble(layers)
    np.testing.assert_allclose(whole(batch, rngs=nnx.Rngs(0)), 14.0)
    np.testing.assert_allclose(whole(batch, train=True, rngs=nnx.Rngs(0)), 114.0)
    with pytest.raises(ValueError, match=r"asks for a random stream. Pass `rngs`"):
        whole(batch)
    with pytest.raises(ValueError, match=r"Got 'other' for layers/1 \(relu\); the batch has inputs, and the named"):
        whole({"inputs": jnp.ones(2)})


def test_every_layer_needs_a_module() -> None:
    with pytest.raises(ValueError, match=r"Every layer must have a module. layers/0 is a"):
        assemble([call(graph_models.Dense, lambda dense, x: dense(x))])
    with pytest.raises(ValueError, match=r"must have one entry for each layer. Got 1 for 2 layers."):
        assemble([nnx.relu, nnx.relu], [nnx.Dropout(0.1)])
