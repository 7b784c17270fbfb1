"""What the fields of published models compute: positions, windows, caps, norms; and which values cannot be."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshpipe import make_mesh
from meshpipe.layers.examine import abstract_layers
from meshpipe.models import GPT2Config, LanguageModelConfig
from meshpipe.models.attention import attend
from meshpipe.models.gpt2 import GPT2Embedding, document_positions
from meshpipe.models.language_model import WindowConfig
from meshpipe.models.norms import NormConfig
from meshpipe.models.rope import RopeScaling, rotate

WITHOUT: dict[str, list[dict[str, Any]]] = {
    "llama3": [{"rope_scaling": RopeScaling()}, {"rope_theta": 10_000.0}],
    "mistral": [{"window": WindowConfig()}, {"window": WindowConfig(size=7)}],
    "qwen3": [{"norm": NormConfig(epsilon=1e-3, queries=True)}],
    "gemma2": [
        {"attention_softcap": None},
        {"logit_softcap": None},
        {"query_scalar": None},
        {"scale_embedding": False},
        {"gate": "silu"},
        {"window": WindowConfig(size=6)},
        {"norm": NormConfig(epsilon=1e-6, branches=True)},
    ],
    "gemma3": [
        {"window": WindowConfig(size=6, global_every=3)},
        {"rope_scaling": RopeScaling()},
    ],
}
"""Fields as they must not be, by golden model."""


def call(layers: list[nnx.Module], inputs: jax.Array, **fields: jax.Array) -> jax.Array:
    @nnx.jit
    def run(layers: list[nnx.Module], inputs: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
        embedding, *blocks, head = layers
        x = embedding(inputs, **fields) if isinstance(embedding, GPT2Embedding) else embedding(inputs)
        for block in blocks:
            x = block(x, **fields)
        return head(x)

    return run(layers, inputs, fields)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT)
def test_every_field_of_a_golden_model_changes_its_logits(name: str) -> None:
    expected = golden.expected(name)
    for changes in WITHOUT[name]:
        layers = golden.modules(name, replace(golden.CONFIGS[name], **changes))
        difference = np.abs(call(layers, jnp.asarray(expected["ids"])) - expected["logits"]).max()
        assert difference > 100 * golden.TOLERANCE, changes


@pytest.mark.parametrize("name", ["gpt2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_documents_of_a_window_are_read_as_each_alone(name: str) -> None:
    """The first document has 6 tokens, the second 10; the positions of both begin at 0, given or not."""
    ids, layers = jnp.asarray(golden.expected(name)["ids"]), golden.modules(name)
    packed = jnp.concatenate([ids[:, :6], ids[:, :10]], axis=1)
    segment_ids = jnp.asarray([[3] * 6 + [4] * 10] * 3)
    positions = jnp.asarray([[*range(6), *range(10)]] * 3)
    expected = golden.expected(name)["logits"]
    for fields in ({"segment_ids": segment_ids}, {"segment_ids": segment_ids, "positions": positions}):
        logits = call(layers, packed, **fields)
        np.testing.assert_allclose(logits[:, :6], expected[:, :6], rtol=0, atol=golden.TOLERANCE)
        np.testing.assert_allclose(logits[:, 6:], expected[:, :10], rtol=0, atol=golden.TOLERANCE)


def test_positions_of_documents() -> None:
    found = document_positions(jnp.asarray([[0, 0, 0, 1, 1, 2], [5, 3, 3, 5, 5, 5]]))
    np.testing.assert_array_equal(found, [[0, 1, 2, 0, 1, 0], [0, 0, 1, 0, 1, 2]])


def test_rotary_positions_that_are_given() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 1, 8))
    rows = jnp.asarray([[0, 1, 2, 3, 4], [7, 7, 2, 0, 1]])
    turn = jax.jit(rotate, static_argnums=1)
    found = turn(x, 100.0, rows)
    np.testing.assert_allclose(found[0], turn(x, 100.0)[0], atol=1e-6)
    later = turn(jnp.tile(x[1:, :1], (1, 8, 1, 1)), 100.0)[0, 7]
    np.testing.assert_allclose(found[1, 0], later, atol=1e-6)


def test_scaling_stretches_long_wavelengths_alone() -> None:
    """Wavelengths of 8, 64, 512 and 4096 positions, of which a model trained on 256 has seen 32, 4, 0.5 and 0.06."""
    frequencies = 2 * math.pi / jnp.asarray([8.0, 64.0, 512.0, 4096.0])
    scaling = RopeScaling(
        kind="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=16.0, original_positions=256
    )
    kept = (4 - 1) / (16 - 1)
    expected = frequencies * jnp.asarray([1.0, kept + (1 - kept) / 8, 1 / 8, 1 / 8])
    np.testing.assert_allclose(scaling.scale(frequencies, 8.0), expected, rtol=1e-6)
    linear = RopeScaling(kind="linear", factor=8.0)
    np.testing.assert_allclose(linear.scale(frequencies, 8.0), frequencies / 8)


@pytest.mark.parametrize(("softcap", "window"), [(None, 3), (3.0, None), (3.0, 1)])
def test_attention_equals_the_formula(softcap: float | None, window: int | None) -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, (2, 6, heads, 4)) for k, heads in zip(keys, (4, 2, 2), strict=True))
    segment_ids = jnp.asarray([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]])
    found = jax.jit(partial(attend, causal=True, window=window, softcap=softcap, scale=2.0))(
        query, key, value, segment_ids=segment_ids
    )
    scores = 2.0 * jnp.einsum("bqhd,bkhd->bhqk", query, jnp.repeat(key, 2, axis=2))
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    ahead = jnp.arange(6)[:, None] - jnp.arange(6)
    seen = (segment_ids[:, :, None] == segment_ids[:, None, :]) & (ahead >= 0) & (ahead < (window or 6))
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    expected = jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.repeat(value, 2, axis=2))
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_text_longer_than_the_learned_positions_is_refused() -> None:
    layers = golden.modules("gpt2")
    with pytest.raises(ValueError, match="Got 65 tokens and 64 positions"):
        layers[0](jnp.zeros((1, 65), jnp.int32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LanguageModelConfig(head_dim=7), "`head_dim` must be even"),
        (lambda: LanguageModelConfig(head_dim=0), "`head_dim` must be at least 1"),
        (lambda: LanguageModelConfig(attention_softcap=0.0), "`attention_softcap` must be above 0"),
        (lambda: LanguageModelConfig(logit_softcap=math.nan), "`logit_softcap` must be above 0"),
        (lambda: LanguageModelConfig(query_scalar=-1.0), "`query_scalar` must be above 0"),
        (lambda: NormConfig(epsilon=0.0), "`epsilon` must be a number between 0 and 1"),
        (lambda: WindowConfig(size=0), "`size` must be at least 1"),
        (lambda: WindowConfig(global_every=2), "need its `size`"),
        (lambda: WindowConfig(size=4, global_every=1), "`global_every` must be"),
        (lambda: WindowConfig(size=4, rope_theta=1.0), "`rope_theta` must be a number above 1"),
        (lambda: RopeScaling(factor=2.0), "`factor` needs a `kind` of scaling"),
        (lambda: RopeScaling(kind="linear", factor=0.5), "`factor` must be a number from 1 on"),
        (lambda: RopeScaling(kind="llama3", low_frequency_factor=4.0), "below `high_frequency_factor`"),
        (lambda: RopeScaling(kind="yarn", beta_slow=64.0), "below `beta_fast`"),
        (lambda: RopeScaling(kind="linear", factor=2.0, beta_fast=8.0), "`beta_fast` is for a `kind` of yarn"),
        (lambda: GPT2Config(d_model=10), "must be a multiple of `num_heads`. Got 10 with 4 heads. The next .* is 12"),
        (lambda: GPT2Config(max_positions=0), "`max_positions` must be at least 1"),
        (lambda: GPT2Config(norm_epsilon=2.0), "`norm_epsilon` must be"),
        (lambda: GPT2Config(d_hidden=0), "`d_hidden` must be at least 1"),
    ],
)
def test_fields_that_cannot_be(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_odd_vocabulary_is_not_split_and_the_model_says_so() -> None:
    for config in (LanguageModelConfig(vocab_size=257), GPT2Config(vocab_size=257)):
        axes = {path: axes for layer in abstract_layers(config.layers(), ()) for path, axes in layer.axes.items()}
        odd = [path for path in axes if path.endswith(("0/embedding", "tokens/embedding"))]
        assert len(odd) == 2
        assert all(axes[path][0] is None for path in odd)
        (_, note) = config.notes(make_mesh(1, 1, 2))
        assert note == "The tensor axis does not split the 257 tokens of the vocabulary, which are odd."
        assert len(config.notes(make_mesh(2))) == len(replace(config, vocab_size=256).notes(make_mesh(1, 1, 2))) == 1
