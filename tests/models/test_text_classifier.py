"""The text classifier's layers, loss and metrics, and the recipes that train it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshpipe.layers.examine import abstract_layers
from meshpipe.models import TextClassifierConfig
from recipes import text_classifier as recipes

TINY = TextClassifierConfig(d_model=16, num_heads=2)
DROPPING = dataclasses.replace(TINY, dropout_rate=0.5)
LAYOUTS = ("data", "pipeline", "pipeline_data", "pipeline_tensor", "pipeline_data_tensor")


@functools.cache
def build(config: TextClassifierConfig) -> list[nnx.Module]:
    with nnx.use_eager_sharding(False):
        return nnx.jit(lambda: [layer(rngs=nnx.Rngs(i)) for i, layer in enumerate(config.layers())])()


@nnx.jit
def call(layers: list[nnx.Module], inputs: Any) -> Any:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def batch(size: int = 3, seq: int = 12) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {"inputs": jnp.asarray(rng.integers(0, 256, (size, seq))), "labels": jnp.asarray(rng.integers(0, 10, size))}


def parameter_count(config: TextClassifierConfig) -> int:
    return sum(math.prod(p.shape) for layer in abstract_layers(config.layers(), ()) for p in layer.params.values())


def test_four_layers_of_three_kinds():
    names = [type(layer).__name__ for layer in build(TINY)]
    assert names == ["ConvolutionEmbedding", "EncoderBlock", "EncoderBlock", "PoolingHead"]


def test_sizes_that_the_docstrings_name():
    assert round(parameter_count(TextClassifierConfig.small()) / 1e6, 2) == 0.16
    assert round(parameter_count(TextClassifierConfig()) / 1e6, 1) == 2.3


def test_loss_is_a_sum_and_the_number_of_examples():
    layers, data = build(TINY), batch()
    output = call(layers, data["inputs"])
    total, weight = TINY.loss(output, data)
    expected = -jax.nn.log_softmax(output)[jnp.arange(3), data["labels"]].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert (weight, total.dtype, weight.dtype) == (3, jnp.float32, jnp.float32)


def test_accuracy_counts_hits():
    data = batch()
    output = jax.nn.one_hot(data["labels"].at[0].add(1) % 10, 10)
    assert TINY.metrics(output, data)["accuracy"] == (2, 3)


def test_the_order_of_bytes_matters():
    layers, inputs = build(TINY), batch()["inputs"]
    assert not np.allclose(call(layers, inputs), call(layers, inputs[:, ::-1]), atol=1e-3)


def test_dropout_is_for_training_only():
    layers, inputs = build(DROPPING), batch()["inputs"]
    assert not np.allclose(call(layers, inputs), call(layers, inputs))
    for layer in layers:
        layer.eval()
    np.testing.assert_array_equal(call(layers, inputs), call(layers, inputs))


def test_bfloat16_computes_in_it_and_keeps_parameters_and_loss_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    layers, data = build(config), batch()
    output = call(layers, data["inputs"])
    assert output.dtype == jnp.bfloat16
    assert config.loss(output, data)[0].dtype == jnp.float32
    parameters = jax.tree.leaves(nnx.state(nnx.List(layers), nnx.Param))
    assert {p.dtype for p in parameters} == {jnp.dtype(jnp.float32)}


def test_every_parameter_names_its_logical_axes():
    for layer in abstract_layers(TINY.layers(), ()):
        assert {path: len(axes) for path, axes in layer.axes.items()} == {
            p: len(v.shape) for p, v in layer.params.items()
        }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_model": 0}, "`d_model` must be at least 1"),
        ({"d_model": 36}, "multiple of 2 \\* `num_heads`.*next multiple is 48"),
        ({"dropout_rate": 1.0}, "`dropout_rate`"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        TextClassifierConfig(**sizes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_thing(name: str):
    base, layout = recipes.single(), getattr(recipes, name)()
    assert layout == dataclasses.replace(base, mesh=layout.mesh, pipeline=layout.pipeline)
    assert layout.pipeline.num_microbatches == (4 * layout.mesh.pipeline if "pipeline" in name else 1)
    for axis in ("pipeline", "data", "tensor"):
        assert (getattr(layout.mesh, axis) > 1) == (axis in name.split("_"))
