"""A transformer that reads one text and writes another: encoder blocks, and decoder blocks that attend to what the
encoder found (arXiv 1706.03762).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from meshpipe.layers.embed import Embed
from meshpipe.layers.fields import named, reading
from meshpipe.layers.layer import LayerLike
from meshpipe.models.classification import accuracy, cross_entropy
from meshpipe.models.initializers import EMBED, VOCAB, embedding_init, kernel_init, ones_init
from meshpipe.models.model import SumAndWeight
from meshpipe.models.perceptron import up_and_down
from meshpipe.models.transformer import Attention, TransformerConfig, check_at_least_one, check_heads


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(TransformerConfig):
    """Sizes of the encoder-decoder; its layers are two embeddings, every block, and the head.

    Batch fields: `source` int32 [batch, source_seq], what the encoder reads; `inputs` int32 [batch, seq], what the
    decoder reads, the targets one place later; `targets` int32 [batch, seq].
    """

    input: ClassVar[str] = "source"

    d_model: int = 64
    """Number of features of every position between the layers."""
    num_encoder_blocks: int = 3
    """Number of blocks that read the source; each is a layer."""
    num_decoder_blocks: int = 3
    """Number of blocks that read the encoder's output beside what was written so far; each is a layer."""
    num_heads: int = 4
    """Number of attention heads per block; d_model must be a multiple of it."""
    max_positions: int = 16
    """Largest number of positions of source and targets: each position has features of its own, which are learned."""
    vocab_size: int = 256
    """Number of different tokens; bytes need 256."""

    def __post_init__(self) -> None:
        check_at_least_one(
            d_model=self.d_model,
            num_encoder_blocks=self.num_encoder_blocks,
            num_decoder_blocks=self.num_decoder_blocks,
            num_heads=self.num_heads,
            max_positions=self.max_positions,
            vocab_size=self.vocab_size,
        )
        check_heads(self.d_model, self.num_heads, self.num_heads, rotary=False)

    def layers(self) -> list[LayerLike]:
        encoder: list[LayerLike] = [partial(EncoderBlock, self)] * self.num_encoder_blocks
        decoder = [partial(DecoderBlock, self)] * self.num_decoder_blocks
        embedding = partial(PositionEmbedding, self)
        encoder[-1] = named("memory", encoder[-1])
        return [embedding, *encoder, reading("inputs", embedding), *decoder, partial(EncoderDecoderHead, self)]

    def limits(self) -> dict[str, int]:
        return dict.fromkeys(("source", "inputs", "targets"), self.vocab_size)

    def loss(self, output: Float[Array, "batch seq vocab"], batch: Mapping[str, jax.Array]) -> SumAndWeight:
        return cross_entropy(output, batch["targets"])

    def metrics(
        self, output: Float[Array, "batch seq vocab"], batch: Mapping[str, jax.Array]
    ) -> dict[str, SumAndWeight]:
        return accuracy(output, batch["targets"])


class PositionEmbedding(nnx.Module):
    """Features of each token, and of its position."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        width, init = config.d_model, embedding_init(1.0)
        self.tokens = Embed(config.vocab_size, width, dtype=config.dtype, embedding_init=init, rngs=rngs)
        positions = nnx.with_partitioning(nnx.initializers.normal(1.0), (None, EMBED))
        self.positions = Embed(config.max_positions, width, dtype=config.dtype, embedding_init=positions, rngs=rngs)

    def __call__(self, inputs: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        return self.tokens(inputs) + self.positions(jnp.arange(inputs.shape[1]))


class EncoderBlock(nnx.Module):
    """Attention over the whole source, then a perceptron at every position, each added to its input (pre-norm)."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = rms_norm(config, rngs)
        self.attention = attention(config, causal=False, rngs=rngs)
        self.perceptron = Perceptron(config, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.perceptron(x + self.attention(self.attention_norm(x)))


class DecoderBlock(nnx.Module):
    """Attention to what was written so far, attention to the memory of the encoder, and a perceptron."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = rms_norm(config, rngs)
        self.attention = attention(config, causal=True, rngs=rngs)
        self.memory_norm = rms_norm(config, rngs)
        self.memory_attention = attention(config, causal=False, rngs=rngs)
        self.perceptron = Perceptron(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch seq embed"], memory: Float[Array, "batch source_seq embed"]
    ) -> Float[Array, "batch seq embed"]:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.memory_attention(self.memory_norm(x), memory=memory)
        return self.perceptron(x)


class Perceptron(nnx.Module):
    """A perceptron at every position, added to its input."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        width, dtype = config.d_model, config.dtype
        self.norm = rms_norm(config, rngs)
        self.up, self.down = up_and_down(width, 4 * width, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class EncoderDecoderHead(nnx.Module):
    """The final norm, and one logit per token of the vocabulary."""

    def __init__(self, config: EncoderDecoderConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = rms_norm(config, rngs)
        self.tokens = nnx.Linear(
            config.d_model,
            config.vocab_size,
            use_bias=False,
            dtype=config.dtype,
            kernel_init=kernel_init(EMBED, VOCAB),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        return self.tokens(self.norm(x))


def attention(config: EncoderDecoderConfig, *, causal: bool, rngs: nnx.Rngs) -> Attention:
    return Attention(
        config.d_model,
        config.num_heads,
        config.num_heads,
        causal=causal,
        rope_theta=None,  # the embeddings mark positions
        implementation=config.attention,
        dtype=config.dtype,
        rngs=rngs,
    )


def rms_norm(config: EncoderDecoderConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, dtype=config.dtype, scale_init=ones_init(EMBED), rngs=rngs)
