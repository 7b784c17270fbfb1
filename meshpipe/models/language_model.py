"""A language model in the shape of Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Fields of its config make it one of Llama's relatives: Mistral, Qwen 2 and 3, Gemma 2 and 3.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from meshpipe.errors import ArgumentError, check_positive, check_whole
from meshpipe.layers.embed import Embed
from meshpipe.models.initializers import EMBED, HIDDEN, embedding_init, kernel_init
from meshpipe.models.model import LayerConstructor
from meshpipe.models.next_token import NextTokenConfig
from meshpipe.models.norms import NormConfig, rms_norm
from meshpipe.models.rope import RopeScaling, check_theta
from meshpipe.models.transformer import Attention, check_at_least_one, check_heads


@dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """How far back the blocks attend."""

    size: int | None = None
    """Number of positions that a block attends to, its own and those just before it; None is all before it."""
    global_every: int | None = None
    """Every n-th block has no window: blocks n, 2n and so on, counted from 1. None gives every block the window."""
    rope_theta: float | None = None
    """Base of the wavelengths of rotary positions in blocks with a window, which are not scaled (Gemma 3); None is as
    in the other blocks."""

    def __post_init__(self) -> None:
        section = "model.window"
        if self.size is not None:
            check_whole("size", self.size, section=section)
        elif self.global_every is not None or self.rope_theta is not None:
            raise ArgumentError("`global_every` and `rope_theta` of a window need its `size`. Got none.", section)
        if self.global_every is not None:
            check_whole("global_every", self.global_every, 2, section=section)
        if self.rope_theta is not None:
            check_theta("rope_theta", self.rope_theta, section)


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(NextTokenConfig):
    """Sizes of the language model; its layers are the embedding, every block, and the head.

    Batch fields, each [batch, seq]: `inputs` and `targets` int32; `segment_ids` int32, equal within a document;
    `weights` float32, 0 where a target does not count. Without `segment_ids` a window is one document. `positions`
    int32, where the batch has them, are what RoPE marks; otherwise it marks 0 to seq - 1.
    """

    d_model: int = 64
    """Number of features of every position between the layers."""
    num_blocks: int = 6
    """Number of transformer blocks; each is a layer."""
    num_heads: int = 4
    """Number of attention heads per block; d_model must be a multiple of twice this, unless `head_dim` is given."""
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
    head_dim: int | None = None
    """Number of features of a head, an even one; None is d_model / num_heads."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen 2)."""
    gate: Literal["silu", "gelu"] = "silu"
    """What gates the hidden units: SiLU, or the tanh approximation of GELU (Gemma)."""
    query_scalar: float | None = None
    """Attention scores are divided by the root of this (Gemma); None is the number of features of a head."""
    attention_softcap: float | None = None
    """Attention scores are kept within +-this by a tanh (Gemma 2); None leaves them."""
    logit_softcap: float | None = None
    """Logits are kept within +-this by a tanh (Gemma 2); None leaves them."""
    scale_embedding: bool = False
    """Whether the embedding's output is multiplied by the root of d_model (Gemma)."""
    norm: NormConfig = field(default_factory=NormConfig)
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    window: WindowConfig = field(default_factory=WindowConfig)

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
        check_heads(self.d_model, self.num_heads, self.num_kv_heads, self.head_dim)
        check_theta("rope_theta", self.rope_theta, "model")
        for name in ("query_scalar", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name), section="model")

    @property
    def features_of_a_head(self) -> int:
        return super().features_of_a_head if self.head_dim is None else self.head_dim

    @property
    def caps_scores(self) -> bool:
        return self.attention_softcap is not None

    def has_window(self, block: int) -> bool:
        """Whether a block, counted from 0, attends only to a window."""
        every = self.window.global_every
        return self.window.size is not None and (every is None or (block + 1) % every != 0)

    def layers(self) -> list[LayerConstructor]:
        init = embedding_init(self.d_model**-0.5 if self.tie_embedding else 1.0, self.vocab_size)
        embed = ScaledEmbed if self.scale_embedding else Embed
        embedding = partial(embed, self.vocab_size, self.d_model, dtype=self.dtype, embedding_init=init)
        with_window = {window: partial(DecoderBlock, self, window) for window in (False, True)}
        blocks = [with_window[self.has_window(block)] for block in range(self.num_blocks)]
        return self.stored([embedding, *blocks, partial(LanguageModelHead, self)])

    def tied(self) -> tuple[tuple[str, ...], ...]:
        if not self.tie_embedding:
            return ()
        return (("layers/0/embedding", f"layers/{self.num_blocks + 1}/tokens/embedding"),)


class ScaledEmbed(Embed):
    """An embedding whose output is multiplied by the root of its number of features."""

    def __call__(self, inputs: Int[Array, "batch seq"], out_sharding: Any = None) -> Float[Array, "batch seq embed"]:
        x = super().__call__(inputs, out_sharding)
        return x * jnp.asarray(self.features**0.5, x.dtype)


class DecoderBlock(nnx.Module):
    """Attention to earlier positions of the same document, then SwiGLU, each added to its input (pre-norm)."""

    def __init__(self, config: LanguageModelConfig, window: bool = False, *, rngs: nnx.Rngs) -> None:
        # Branches start small enough that all of them together do not drown the embedding (GPT-2, section 2.3).
        out_scale = (2 * config.num_blocks) ** -0.5
        theta, scaling = config.rope_theta, config.rope_scaling
        if window and config.window.rope_theta is not None:
            theta, scaling = config.window.rope_theta, RopeScaling()
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(
            config.d_model,
            config.num_heads,
            config.num_kv_heads,
            causal=True,
            rope_theta=theta,
            rope_scaling=scaling,
            head_dim=config.head_dim,
            qkv_bias=config.qkv_bias,
            head_norm=config.norm if config.norm.queries else None,
            window=config.window.size if window else None,
            softcap=config.attention_softcap,
            scale=None if config.query_scalar is None else config.query_scalar**-0.5,
            out_scale=out_scale,
            implementation=config.attention,
            dtype=config.dtype,
            rngs=rngs,
        )
        self.attention_post_norm = _norm(config, rngs) if config.norm.branches else None
        self.swiglu_norm = _norm(config, rngs)
        self.swiglu = SwiGLU(config, out_scale=out_scale, rngs=rngs)
        self.swiglu_post_norm = _norm(config, rngs) if config.norm.branches else None

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        segment_ids: Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        attended = self.attention(self.attention_norm(x), segment_ids, positions)
        x = x + (attended if self.attention_post_norm is None else self.attention_post_norm(attended))
        found = self.swiglu(self.swiglu_norm(x))
        return x + (found if self.swiglu_post_norm is None else self.swiglu_post_norm(found))


class SwiGLU(nnx.Module):
    """A perceptron whose hidden units are gated by a SiLU (arXiv 2002.05202), or by a GELU."""

    def __init__(self, config: LanguageModelConfig, *, out_scale: float, rngs: nnx.Rngs) -> None:
        width, hidden, dtype = config.d_model, config.d_hidden, config.dtype
        up_init, down_init = kernel_init(EMBED, HIDDEN), kernel_init(HIDDEN, EMBED, scale=out_scale)
        self.activation = config.gate
        self.gate = nnx.Linear(width, hidden, use_bias=False, dtype=dtype, kernel_init=up_init, rngs=rngs)
        self.up = nnx.Linear(width, hidden, use_bias=False, dtype=dtype, kernel_init=up_init, rngs=rngs)
        self.down = nnx.Linear(hidden, width, use_bias=False, dtype=dtype, kernel_init=down_init, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        gate = self.gate(x)
        return self.down((nnx.silu(gate) if self.activation == "silu" else nnx.gelu(gate)) * self.up(x))


class LanguageModelHead(nnx.Module):
    """The final norm, and one logit per token of the vocabulary."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs) -> None:
        self.softcap = config.logit_softcap
        self.norm = _norm(config, rngs)
        # An embedding used backwards, tied or not, so that both have one shape and one path.
        init = embedding_init(config.d_model**-0.5, config.vocab_size)
        self.tokens = nnx.Embed(config.vocab_size, config.d_model, dtype=config.dtype, embedding_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq vocab"]:
        logits = self.tokens.attend(self.norm(x))
        return logits if self.softcap is None else self.softcap * jnp.tanh(logits / self.softcap)


def _norm(config: LanguageModelConfig, rngs: nnx.Rngs) -> nnx.Module:
    return rms_norm(config.d_model, EMBED, config.norm, dtype=config.dtype, rngs=rngs)
