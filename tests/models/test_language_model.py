"""What the language model may look at, its loss, its sizes, and the recipes that train it."""

import dataclasses
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshpipe.layers.examine import abstract_layers
from meshpipe.models import LanguageModelConfig
from meshpipe.models.rope import rotate
from meshpipe.models.transformer import Attention
from recipes import language_model as recipes

DEBUG = LanguageModelConfig.debug()
LAYOUTS = ("data", "pipeline", "pipeline_data", "pipeline_tensor", "pipeline_data_tensor")


@pytest.fixture(scope="module")
def layers() -> list[nnx.Module]:
    return build(DEBUG)


def build(config: LanguageModelConfig) -> list[nnx.Module]:
    with nnx.use_eager_sharding(False):
        return nnx.jit(lambda: [layer(rngs=nnx.Rngs(i)) for i, layer in enumerate(config.layers())])()


@nnx.jit
def call(layers: list[nnx.Module], inputs: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    x: Any = inputs
    for layer in layers:
        fields = (
            {"segment_ids": segment_ids} if "segment_ids" in inspect.signature(type(layer).__call__).parameters else {}
        )
        x = layer(x, **fields)
    return x


def tokens(seq: int = 12, size: int = 2) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (size, seq)))


def parameter_count(config: LanguageModelConfig) -> int:
    return sum(math.prod(p.shape) for layer in abstract_layers(config.layers(), ()) for p in layer.params.values())


def test_attention_equals_the_formula_with_repeated_key_and_value_heads():
    with nnx.use_eager_sharding(False):
        attention = Attention(16, 4, 2, causal=True, rope_theta=100.0, dtype="float32", rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    query, key = (jnp.einsum("bse,ehd->bshd", x, p.kernel[...]) for p in (attention.query, attention.key))
    value = jnp.einsum("bse,ehd->bshd", x, attention.value.kernel[...])
    query, key = rotate(query, 100.0), jnp.repeat(rotate(key, 100.0), 2, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2  # the root of 4 features a head
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((6, 6), bool)), scores, -jnp.inf))
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(value, 2, axis=2))
    expected = jnp.einsum("bqhd,hde->bqe", mixed, attention.out.kernel[...])
    np.testing.assert_allclose(attention(x), expected, atol=1e-5)


def test_rotation_keeps_lengths_and_sees_only_differences_of_positions():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    turned_q, turned_k = (rotate(jnp.tile(x, (1, 10, 1, 1)), 100.0)[0, :, 0] for x in (q, k))
    np.testing.assert_allclose(jnp.linalg.norm(turned_q, axis=-1), jnp.linalg.norm(q) * jnp.ones(10), rtol=1e-5)
    np.testing.assert_allclose(turned_q[3] @ turned_k[1], turned_q[9] @ turned_k[7], rtol=1e-4)
    assert abs(turned_q[3] @ turned_k[1] - turned_q[3] @ turned_k[2]) > 1e-3


def test_later_bytes_are_not_seen(layers: list[nnx.Module]):
    inputs = tokens()
    before, after = call(layers, inputs), call(layers, inputs.at[:, 7].set(0))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_other_documents_of_the_window_are_not_seen(layers: list[nnx.Module]):
    inputs, segment_ids = tokens(), jnp.asarray([[0] * 5 + [1] * 7] * 2)
    packed = call(layers, inputs, segment_ids)
    np.testing.assert_allclose(packed[:, :5], call(layers, inputs[:, :5]), atol=1e-5)
    # Rotary positions see differences only, so a document is the same wherever it starts.
    np.testing.assert_allclose(packed[:, 5:], call(layers, inputs[:, 5:]), atol=1e-5)


def test_loss_and_accuracy_leave_out_targets_of_weight_zero():
    output = jax.random.normal(jax.random.key(0), (2, 3, 256))
    targets = output.argmax(-1).at[0, 1].add(1) % 256
    batch = {"targets": targets, "weights": jnp.asarray([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])}
    losses = -jax.nn.log_softmax(output)[jnp.arange(2)[:, None], jnp.arange(3), targets]
    total, weight = DEBUG.loss(output, batch)
    np.testing.assert_allclose(total, losses[0, 0] + losses[0, 1] + losses[1, 0], rtol=1e-6)
    assert weight == 3
    assert DEBUG.metrics(output, batch)["accuracy"] == (2, 3)


def test_a_tied_head_has_the_embedding_s_shape_and_path():
    config = dataclasses.replace(DEBUG, tie_embedding=True)
    shapes = {
        path: p.shape
        for layer in abstract_layers(config.layers(), ("segment_ids",))
        for path, p in layer.params.items()
    }
    (group,) = config.tied()
    assert group == ("layers/0/embedding", "layers/3/tokens/embedding")
    assert {shapes[path] for path in group} == {(256, 32)}
    assert DEBUG.tied() == ()


def test_bfloat16_computes_in_it_and_keeps_the_loss_in_float32():
    config = dataclasses.replace(DEBUG, dtype="bfloat16")
    output = call(build(config), tokens(), jnp.zeros((2, 12), jnp.int32))
    assert output.dtype == jnp.bfloat16
    assert config.loss(output, {"targets": tokens(), "weights": jnp.ones((2, 12))})[0].dtype == jnp.float32


def test_every_parameter_names_its_logical_axes():
    for layer in abstract_layers(DEBUG.layers(), ("segment_ids",)):
        assert {path: len(axes) for path, axes in layer.axes.items()} == {
            p: len(v.shape) for p, v in layer.params.items()
        }


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (LanguageModelConfig.debug(), 0.035),
        (LanguageModelConfig.small(), 0.329),
        (LanguageModelConfig.llama_7b(), 6738.416),
        (LanguageModelConfig.llama_70b(), 68976.648),
    ],
)
def test_published_sizes(config: LanguageModelConfig, millions: float):
    assert round(parameter_count(config) / 1e6, 3) == millions


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_blocks": 0}, "`num_blocks` must be at least 1"),
        ({"num_kv_heads": 3}, "multiple of `num_kv_heads`"),
        ({"d_model": 68}, "next multiple is 72"),
        ({"rope_theta": 1.0}, "`rope_theta`"),
    ],
)
def test_sizes_that_cannot_be(sizes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LanguageModelConfig(**sizes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_the_same_thing(name: str):
    base, layout = recipes.single(), getattr(recipes, name)()
    assert layout == dataclasses.replace(base, mesh=layout.mesh, pipeline=layout.pipeline)
    assert layout.pipeline.num_microbatches == (4 * layout.mesh.pipeline if "pipeline" in name else 1)
    for axis in ("pipeline", "data", "tensor"):
        assert (getattr(layout.mesh, axis) > 1) == (axis in name.split("_"))
