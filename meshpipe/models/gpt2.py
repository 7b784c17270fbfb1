"""GPT-2: learned positions, LayerNorm, GELU, biases, and the embedding as the head's weights."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from meshpipe.errors import ArgumentError, check_whole
from meshpipe.layers.embed import Embed
from meshpipe.models.initializers import EMBED, embedding_init
from meshpipe.models.model import LayerConstructor
from meshpipe.models.next_token import NextTokenConfig
from meshpipe.models.norms import check_epsilon, layer_norm
from meshpipe.models.perceptron import Perceptron
from meshpipe.models.transformer import Attention, check_at_least_one, check_heads


@dataclass(frozen=True, kw_only=True)
class GPT2Config(NextTokenConfig):
    """Sizes of GPT-2 (Radford et al. 2019); its layers are the embeddings, every block, and the head.

    Batch fields as for `LanguageModelConfig`. Without `positions`, those of every document begin at 0.
    """

    d_model: int = 64
    """Number of features of every position between the layers."""
    num_blocks: int = 6
    """Number of transformer blocks; each is a layer."""
    num_heads: int = 4
    """Number of attention heads per block; d_model must be a multiple of it."""
    d_hidden: int | None = None
    """Number of hidden units of every block's perceptron; None is 4 * d_model."""
    vocab_size: int = 256
    """Number of different tokens; bytes need 256."""
    max_positions: int = 1024
    """Largest number of positions: each has features of its own, which are learned."""
    norm_epsilon: float = 1e-5
    """Added to variances before their root is taken."""

    def __post_init__(self) -> None:
        check_at_least_one(
            d_model=self.d_model,
            num_blocks=self.num_blocks,
            num_heads=self.num_heads,
            vocab_size=self.vocab_size,
            max_positions=self.max_positions,
        )
        if self.d_hidden is not None:
            check_whole("d_hidden", self.d_hidden, section="model")
        check_heads(self.d_model, self.num_heads, self.num_heads, rotary=False)
        check_epsilon("norm_epsilon", self.norm_epsilon, "model")

    def layers(self) -> list[LayerConstructor]:
        blocks = [partial(GPT2Block, self)] * self.num_blocks
        return self.stored([partial(GPT2Embedding, self), *blocks, partial(GPT2Head, self)])

    def limits(self) -> dict[str, int]:
        return {**super().limits(), "positions": self.max_positions}

    def tied(self) -> tuple[tuple[str, ...], ...]:
        return (("layers/0/tokens/embedding", f"layers/{self.num_blocks + 1}/tokens/embedding"),)


class GPT2Embedding(nnx.Module):
    """Features of each token, and of its position."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs) -> None:
        width, dtype = config.d_model, config.dtype
        tokens = embedding_init(0.02, config.vocab_size)
        positions = nnx.with_partitioning(nnx.initializers.normal(0.02), (None, EMBED))
        self.tokens = Embed(config.vocab_size, width, dtype=dtype, embedding_init=tokens, rngs=rngs)
        self.positions = Embed(config.max_positions, width, dtype=dtype, embedding_init=positions, rngs=rngs)

    def __call__(
        self,
        inputs: Int[Array, "batch seq"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        if positions is None:
            seq, most = inputs.shape[1], self.positions.num_embeddings
            if seq > most:
                raise ArgumentError(
                    "A text must have at most `max_positions` tokens: GPT-2 has learned features for that many "
                    f"positions. Got {seq} tokens and {most} positions. Choose shorter sequences.",
                    "model",
                )
            positions = jnp.arange(seq)[None] if segment_ids is None else document_positions(segment_ids)
        return self.tokens(inputs) + self.positions(positions)


class GPT2Block(nnx.Module):
    """Attention to earlier positions of the same document, then a perceptron, each added to its input (pre-norm)."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs) -> None:
        out_scale = (2 * config.num_blocks) ** -0.5
        self.attention_norm = _layer_norm(config, rngs)
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            config.num_heads,
            causal=True,
            rope_theta=None,
            qkv_bias=True,
            out_bias=True,
            out_scale=out_scale,
            implementation=config.attention,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.perceptron_norm = _layer_norm(config, rngs)
        hidden = 4 * config.d_model if config.d_hidden is None else config.d_hidden
        self.perceptron = Perceptron(config.d_model, hidden, out_scale=out_scale, dtype=config.dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        x = x + self.attention(self.attention_norm(x), segment_ids, positions)
        return x + self.perceptron(self.perceptron_norm(x))


class GPT2Head(nnx.Module):
    """The final norm, and one logit per token of the vocabulary."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs) -> None:
        self.norm = _layer_norm(config, rngs)
        init = embedding_init(0.02, config.vocab_size)
        self.tokens = nnx.Embed(config.vocab_size, config.d_model, dtype=config.dtype, embedding_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        return self.tokens.attend(self.norm(x))


def document_positions(segment_ids: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """The position of every token in its document, where equal ids in a row are one."""
    places = jnp.arange(segment_ids.shape[1])[None]
    first = jnp.concatenate([jnp.ones_like(segment_ids[:, :1]), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return places - jax.lax.cummax(jnp.where(first, places, 0), axis=1)


def _layer_norm(config: GPT2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    epsilon = config.norm_epsilon
    return layer_norm(config.d_model, epsilon=epsilon, fast_variance=False, dtype=config.dtype, rngs=rngs)
