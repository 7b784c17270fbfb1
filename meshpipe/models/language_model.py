"""A language model in the shape of Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from meshpipe.errors import ArgumentError
from meshpipe.models.model import LayerConstructor, SumAndWeight
from meshpipe.models.transformer import (
    EMBED,
    HIDDEN,
    Attention,
    TransformerConfig,
    check_at_least_one,
    check_heads,
    embedding_init,
    kernel_init,
    ones_init,
)


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(TransformerConfig):
    """Sizes of the language model; its layers are the embedding, every block, and the head.

    Batch fields, each [batch, seq]: `inputs` and `targets` int32; `segment_ids` int32, equal within a document;
    `weights` float32, 0 where a target does not count. Without `segment_ids` a window is one document.
    """

    input: ClassVar[str] = "inputs"

    d_model: int = 64
    """Number of features of every position between the layers."""
    num_blocks: int = 6
    """Number of transformer blocks; each is a layer."""
    num_heads: int = 4
    """Number of attention heads per block; d_model must be a multiple of twice this."""
    num_kv_heads: int = 2
    """Number of key and value heads, shared by equal groups of heads; the number of heads is plain multi-head
    attention."""
    d_hidden: int = 192
    """Number of hidden units of every block's SwiGLU."""
    vocab_size: int = 256
    """Number of different tokens; bytes need 256."""
    rope_theta: float = 10_000.0
    """Base of the wavelengths of the rotary positions, which reach up to about 6 * theta tokens."""
    tie_embedding: bool = False
    """Whether the head uses the embedding as its weights, or weights of its own."""

    @classmethod
    def debug(cls) -> "LanguageModelConfig":
        """The smallest with every part: 2 blocks, 2 heads sharing 1 key-value head, 35 thousand parameters."""
        return cls(d_model=32, num_blocks=2, num_heads=2, num_kv_heads=1, d_hidden=64)

    @classmethod
    def small(cls) -> "LanguageModelConfig":
        """0.33 million parameters: learns something within a minute on two CPU cores."""
        return cls()

    @classmethod
    def llama_7b(cls) -> "LanguageModelConfig":
        """6.7 billion parameters, the sizes of Llama 2 7B (arXiv 2307.09288; widths in arXiv 2302.13971, table 2).

        The vocabulary is Llama's 32,000 tokens, so byte-level data uses only the first 256 of them.
        """
        return cls(
            d_model=4096,
            num_blocks=32,
            num_heads=32,
            num_kv_heads=32,
            d_hidden=11_008,
            vocab_size=32_000,
            dtype="bfloat16",
        )

    @classmethod
    def llama_70b(cls) -> "LanguageModelConfig":
        """69 billion parameters, the sizes of Llama 2 70B (arXiv 2307.09288, section 2.2 on grouped-query attention).

        The vocabulary is Llama's 32,000 tokens, so byte-level data uses only the first 256 of them.
        """
        return cls(
            d_model=8192,
            num_blocks=80,
            num_heads=64,
            num_kv_heads=8,
            d_hidden=28_672,
            vocab_size=32_000,
            dtype="bfloat16",
        )

    def __post_init__(self) -> None:
        check_at_least_one(
            d_model=self.d_model,
            num_blocks=self.num_blocks,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            d_hidden=self.d_hidden,
            vocab_size=self.vocab_size,
        )
        check_heads(self.d_model, self.num_heads, self.num_kv_heads)
        if not 1 < self.rope_theta < math.inf:  # False for NaN as well
            raise ArgumentError(f"`rope_theta` must be a number above 1. Got {self.rope_theta}.", "model")

    def layers(self) -> list[LayerConstructor]:
        init = embedding_init(self.d_model**-0.5 if self.tie_embedding else 1.0)
        embedding = partial(nnx.Embed, self.vocab_size, self.d_model, dtype=self.dtype, embedding_init=init)
        blocks = [partial(DecoderBlock, self) for _ in range(self.num_blocks)]
        return [embedding, *blocks, partial(LanguageModelHead, self)]

    def tied(self) -> tuple[tuple[str, ...], ...]:
        if not self.tie_embedding:
            return ()
        return (("layers/0/embedding", f"layers/{self.num_blocks + 1}/tokens/embedding"),)

    def limits(self) -> dict[str, int]:
        return {"inputs": self.vocab_size, "targets": self.vocab_size}

    def loss(self, output: Float[Array, "batch seq vocab"], batch: Mapping[str, jax.Array]) -> SumAndWeight:
        losses = optax.softmax_cross_entropy_with_integer_labels(output.astype(jnp.float32), batch["targets"])
        return (losses * batch["weights"]).sum(), batch["weights"].sum()

    def metrics(
        self, output: Float[Array, "batch seq vocab"], batch: Mapping[str, jax.Array]
    ) -> dict[str, SumAndWeight]:
        hits = output.argmax(axis=-1) == batch["targets"]
        return {"accuracy": ((hits * batch["weights"]).sum(), batch["weights"].sum())}


class DecoderBlock(nnx.Module):
    """Attention to earlier positions of the same document, then SwiGLU, each added to its input (pre-norm)."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs) -> None:
        # Branches start small enough that all of them together do not drown the embedding (GPT-2, section 2.3).
        out_scale = (2 * config.num_blocks) ** -0.5
        self.attention_norm = rms_norm(config, rngs)
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            config.num_kv_heads,
            causal=True,
            rope_theta=config.rope_theta,
            out_scale=out_scale,
            implementation=config.attention,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.swiglu_norm = rms_norm(config, rngs)
        self.swiglu = SwiGLU(config.d_model, config.d_hidden, out_scale=out_scale, dtype=config.dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch seq embed"], segment_ids: Int[Array, "batch seq"] | None = None
    ) -> Float[Array, "batch seq embed"]:
        mask = None if segment_ids is None else same_document(segment_ids)
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.swiglu(self.swiglu_norm(x))


class SwiGLU(nnx.Module):
    """A perceptron whose hidden units are gated by a SiLU (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_hidden: int, *, out_scale: float, dtype: str, rngs: nnx.Rngs) -> None:
        up_init, down_init = kernel_init(EMBED, HIDDEN), kernel_init(HIDDEN, EMBED, scale=out_scale)
        self.gate = nnx.Linear(d_model, d_hidden, use_bias=False, dtype=dtype, kernel_init=up_init, rngs=rngs)
        self.up = nnx.Linear(d_model, d_hidden, use_bias=False, dtype=dtype, kernel_init=up_init, rngs=rngs)
        self.down = nnx.Linear(d_hidden, d_model, use_bias=False, dtype=dtype, kernel_init=down_init, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class LanguageModelHead(nnx.Module):
    """The final norm, and one logit per token of the vocabulary."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = rms_norm(config, rngs)
        # An embedding used backwards, tied or not, so that both have one shape and one path.
        init = embedding_init(config.d_model**-0.5)
        self.tokens = nnx.Embed(config.vocab_size, config.d_model, dtype=config.dtype, embedding_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        return self.tokens.attend(self.norm(x))


def same_document(segment_ids: Int[Array, "batch seq"]) -> Bool[Array, "batch 1 seq seq"]:
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def rms_norm(config: LanguageModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(config.d_model, epsilon=1e-5, dtype=config.dtype, scale_init=ones_init(EMBED), rngs=rngs)
