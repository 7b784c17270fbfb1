"""Norms of transformers."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from meshpipe.errors import ArgumentError
from meshpipe.models.initializers import EMBED, ones_init, zeros_init


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Which norms a block has, and how they compute (RMSNorm, arXiv 1910.07467)."""

    epsilon: float = 1e-5
    """Added to the mean square before its root is taken."""
    offset: bool = False
    """Whether norms multiply by 1 + scale, with scales that begin at 0, as Gemma's do."""
    branches: bool = False
    """Whether the output of attention and of the SwiGLU is normalised as well, before it is added (Gemma 2 and 3)."""
    queries: bool = False
    """Whether the queries and keys of every head are normalised (Qwen 3, Gemma 3; arXiv 2010.04245)."""

    def __post_init__(self) -> None:
        check_epsilon("epsilon", self.epsilon, "model.norm")


def check_epsilon(name: str, epsilon: float, section: str) -> None:
    if not 0 < epsilon < 1:  # False for NaN as well
        raise ArgumentError(f"`{name}` must be a number between 0 and 1. Got {epsilon}.", section)


def rms_norm(size: int, axis: str | None, config: NormConfig, *, dtype: str, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of the last dim of an array, with `size` features along a logical axis."""
    if config.offset:
        return OffsetRMSNorm(size, axis, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
    return nnx.RMSNorm(size, epsilon=config.epsilon, dtype=dtype, scale_init=ones_init(axis), rngs=rngs)


def layer_norm(
    size: int, *, epsilon: float = 1e-6, fast_variance: bool = True, dtype: str, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """The LayerNorm of features between layers. A fast variance is E[x^2] - E[x]^2, which loses digits."""
    return nnx.LayerNorm(
        size,
        epsilon=epsilon,
        use_fast_variance=fast_variance,
        dtype=dtype,
        scale_init=ones_init(EMBED),
        bias_init=zeros_init(EMBED),
        rngs=rngs,
    )


class OffsetRMSNorm(nnx.Module):
    """RMSNorm that multiplies by 1 + scale, computed in float32."""

    def __init__(self, size: int, axis: str | None, *, epsilon: float, dtype: str, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(zeros_init(axis)(rngs.params(), (size,), jnp.float32))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + self.epsilon)
        return (normed * (1 + self.scale[...].astype(jnp.float32))).astype(self.dtype)
