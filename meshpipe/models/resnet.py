"""A residual network for small images: convolutions and batch normalisation (arXiv 1512.03385)."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import einops
import jax
from flax import nnx
from jaxtyping import Array, Float

from meshpipe.errors import check_number, check_whole
from meshpipe.models.classification import accuracy, cross_entropy
from meshpipe.models.initializers import EMBED, HIDDEN, kernel_init, ones_init, zeros_init
from meshpipe.models.model import LayerConstructor, ModelConfig, SumAndWeight

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(ModelConfig):
    """Sizes of the residual network; its layers are the first convolution, every block, and the head.

    Batch fields: `images` float32 [batch, height, width, 1]; `labels` int32 [batch].
    """

    input: ClassVar[str] = "images"

    width: int = 16
    """Number of channels of the first blocks; it doubles where the resolution halves."""
    num_blocks: int = 6
    """Number of residual blocks; each is a layer. The first block of the second half halves the resolution."""
    momentum: float = 0.9
    """How much of its running mean and variance batch normalisation keeps in each microbatch, 0 to 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of computation; parameters are float32. bfloat16 is for accelerators."""

    def __post_init__(self) -> None:
        check_whole("width", self.width, section="model")
        check_whole("num_blocks", self.num_blocks, section="model")
        check_number("momentum", self.momentum, below=1, section="model")

    def layers(self) -> list[LayerConstructor]:
        half = self.num_blocks // 2
        widths = [self.width] * (half + 1) + [2 * self.width] * (self.num_blocks - half)
        blocks = [partial(ResidualBlock, self, before, after) for before, after in itertools.pairwise(widths)]
        return [partial(FirstConvolution, self), *blocks, partial(ClassHead, self, widths[-1])]

    def limits(self) -> dict[str, int]:
        return {"labels": CLASSES}

    def loss(self, output: Float[Array, "batch classes"], batch: Mapping[str, jax.Array]) -> SumAndWeight:
        return cross_entropy(output, batch["labels"])

    def metrics(self, output: Float[Array, "batch classes"], batch: Mapping[str, jax.Array]) -> dict[str, SumAndWeight]:
        return accuracy(output, batch["labels"])


class FirstConvolution(nnx.Module):
    """From pixels to channels, at full resolution."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs) -> None:
        self.convolution = convolution(config, 1, config.width, (None, EMBED), rngs=rngs)
        self.norm = batch_norm(config, config.width, EMBED, rngs)

    def __call__(self, images: Float[Array, "batch height width 1"]) -> Float[Array, "batch height width channels"]:
        return nnx.relu(self.norm(self.convolution(images)))


class ResidualBlock(nnx.Module):
    """Two convolutions, added to their input; where the width grows, the resolution halves."""

    def __init__(self, config: ResNetConfig, width_in: int, width: int, *, rngs: nnx.Rngs) -> None:
        strides = 1 if width_in == width else 2
        self.first = convolution(config, width_in, width, (EMBED, HIDDEN), strides=strides, rngs=rngs)
        self.first_norm = batch_norm(config, width, HIDDEN, rngs)
        self.second = convolution(config, width, width, (HIDDEN, EMBED), rngs=rngs)
        self.second_norm = batch_norm(config, width, EMBED, rngs)
        self.shortcut = (
            None
            if width_in == width
            # Both channels are `embed` axes, and an array has each mesh axis once.
            else convolution(config, width_in, width, (None, EMBED), kernel=1, strides=strides, rngs=rngs)
        )

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height2 width2 channels2"]:
        branch = nnx.relu(self.first_norm(self.first(x)))
        branch = self.second_norm(self.second(branch))
        return nnx.relu(branch + (x if self.shortcut is None else self.shortcut(x)))


class ClassHead(nnx.Module):
    """The mean over all positions, and a linear classifier of it."""

    def __init__(self, config: ResNetConfig, width: int, *, rngs: nnx.Rngs) -> None:
        self.classes = nnx.Linear(
            width,
            CLASSES,
            dtype=config.dtype,
            kernel_init=kernel_init(EMBED, None),
            bias_init=zeros_init(None),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch classes"]:
        return self.classes(einops.reduce(x, "batch height width channels -> batch channels", "mean"))


def convolution(
    config: ResNetConfig,
    width_in: int,
    width: int,
    axes: tuple[str | None, str | None],
    *,
    kernel: int = 3,
    strides: int = 1,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    return nnx.Conv(
        width_in,
        width,
        kernel_size=(kernel, kernel),
        strides=strides,
        use_bias=False,  # batch normalisation would take it away
        dtype=config.dtype,
        kernel_init=kernel_init(None, None, *axes, scale=2**0.5),
        rngs=rngs,
    )


def batch_norm(config: ResNetConfig, width: int, axis: str, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Normalises over the examples of a microbatch, whichever devices they are on."""
    return nnx.BatchNorm(
        width,
        momentum=config.momentum,
        dtype=config.dtype,
        scale_init=ones_init(axis),
        bias_init=zeros_init(axis),
        rngs=rngs,
    )
