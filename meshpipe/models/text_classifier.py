"""A classifier of short texts, byte by byte: convolutions, transformer blocks, pooling."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import einops
import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from meshpipe.errors import check_number
from meshpipe.layers.embed import Embed
from meshpipe.models.classification import accuracy, cross_entropy
from meshpipe.models.initializers import EMBED, HIDDEN, embedding_init, kernel_init, zeros_init
from meshpipe.models.model import LayerConstructor, SumAndWeight
from meshpipe.models.norms import layer_norm
from meshpipe.models.perceptron import up_and_down
from meshpipe.models.transformer import Attention, TransformerConfig, check_at_least_one, check_heads


@dataclass(frozen=True, kw_only=True)
class TextClassifierConfig(TransformerConfig):
    """Sizes of the text classifier; the defaults are its full size, `small` is for trials.

    Batch fields: `inputs` int32 [batch, seq], each a byte; `labels` int32 [batch].
    """

    input: ClassVar[str] = "inputs"

    d_model: int = 256
    """Number of features of every position between the layers."""
    num_blocks: int = 2
    """Number of transformer blocks between the embedding and the head; each is a layer."""
    num_heads: int = 8
    """Number of attention heads per block; d_model must be a multiple of twice this."""
    num_classes: int = 10
    """Number of classes."""
    vocab_size: int = 256
    """Number of different inputs; 256 for bytes."""
    dropout_rate: float = 0.0
    """Share of a branch's features that dropout zeroes in training, 0 to 1; 0 turns it off."""

    @classmethod
    def small(cls) -> "TextClassifierConfig":
        """0.16 million parameters: learns something within a minute on two CPU cores."""
        return cls(d_model=64, num_heads=4)

    def __post_init__(self) -> None:
        check_at_least_one(
            d_model=self.d_model,
            num_blocks=self.num_blocks,
            num_heads=self.num_heads,
            num_classes=self.num_classes,
            vocab_size=self.vocab_size,
        )
        check_heads(self.d_model, self.num_heads, self.num_heads)
        check_number("dropout_rate", self.dropout_rate, below=1, section="model")

    def layers(self) -> list[LayerConstructor]:
        blocks = [partial(EncoderBlock, self)] * self.num_blocks
        return [partial(ConvolutionEmbedding, self), *blocks, partial(PoolingHead, self)]

    def limits(self) -> dict[str, int]:
        return {"inputs": self.vocab_size, "labels": self.num_classes}

    def loss(self, output: Float[Array, "batch classes"], batch: Mapping[str, jax.Array]) -> SumAndWeight:
        return cross_entropy(output, batch["labels"])

    def metrics(self, output: Float[Array, "batch classes"], batch: Mapping[str, jax.Array]) -> dict[str, SumAndWeight]:
        return accuracy(output, batch["labels"])


class ConvolutionEmbedding(nnx.Module):
    """Byte embeddings, to which two convolutions add the neighbourhood of each byte."""

    def __init__(self, config: TextClassifierConfig, *, rngs: nnx.Rngs) -> None:
        width, dtype = config.d_model, config.dtype
        self.tokens = Embed(config.vocab_size, width, dtype=dtype, embedding_init=embedding_init(1.0), rngs=rngs)
        self.widen = nnx.Conv(
            width,
            width,
            kernel_size=5,
            dtype=dtype,
            kernel_init=kernel_init(None, EMBED, HIDDEN),
            bias_init=zeros_init(HIDDEN),
            rngs=rngs,
        )
        self.narrow = nnx.Conv(
            width,
            width,
            kernel_size=5,
            dtype=dtype,
            kernel_init=kernel_init(None, HIDDEN, EMBED),
            bias_init=zeros_init(EMBED),
            rngs=rngs,
        )
        self.norm = layer_norm(config.d_model, dtype=config.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)

    def __call__(self, inputs: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        x = self.tokens(inputs)
        x = x + self.narrow(nnx.gelu(self.widen(x)))
        return self.dropout(self.norm(x))


class EncoderBlock(nnx.Module):
    """Attention over the whole window, then a perceptron at every position, each added to its input (pre-norm)."""

    def __init__(self, config: TextClassifierConfig, *, rngs: nnx.Rngs) -> None:
        width, dtype = config.d_model, config.dtype
        self.attention_norm = layer_norm(config.d_model, dtype=config.dtype, rngs=rngs)
        self.attention = Attention(
            width,
            config.num_heads,
            config.num_heads,
            causal=False,
            rope_theta=10_000.0,
            implementation=config.attention,
            dtype=dtype,
            rngs=rngs,
        )
        self.perceptron_norm = layer_norm(config.d_model, dtype=config.dtype, rngs=rngs)
        self.up, self.down = up_and_down(width, 4 * width, dtype=dtype, rngs=rngs)
        self.attention_dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)
        self.perceptron_dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch seq embed"]:
        x = x + self.attention_dropout(self.attention(self.attention_norm(x)))
        return x + self.perceptron_dropout(self.down(nnx.gelu(self.up(self.perceptron_norm(x)))))


class PoolingHead(nnx.Module):
    """The mean over all positions, and a linear classifier of it."""

    def __init__(self, config: TextClassifierConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = layer_norm(config.d_model, dtype=config.dtype, rngs=rngs)
        # The classes are too few to be split.
        self.classes = nnx.Linear(
            config.d_model,
            config.num_classes,
            dtype=config.dtype,
            kernel_init=kernel_init(EMBED, None),
            bias_init=zeros_init(None),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "batch seq embed"]) -> Float[Array, "batch classes"]:
        return self.classes(einops.reduce(self.norm(x), "batch seq embed -> batch embed", "mean"))
