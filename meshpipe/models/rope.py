"""Rotary positions (RoPE), and how models stretch them beyond the length that they were trained on."""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshpipe.errors import ArgumentError, check_whole


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the wavelengths of rotary positions are stretched for longer texts."""

    kind: Literal["none", "linear", "llama3"] = "none"
    """`linear` stretches all wavelengths (arXiv 2306.15595); `llama3` only long ones, as Llama 3.1 does
    (arXiv 2407.21783, section 3.4.2)."""
    factor: float = 1.0
    """By how much they are stretched."""
    low_frequency_factor: float = 1.0
    """For `llama3`: wavelengths above original_positions / this are stretched by the whole factor."""
    high_frequency_factor: float = 4.0
    """For `llama3`: wavelengths below original_positions / this stay; those between are partly stretched."""
    original_positions: int = 8192
    """For `llama3`: the number of positions that the model was trained on at first."""

    def __post_init__(self) -> None:
        check_whole("original_positions", self.original_positions, section="model.rope_scaling")
        if not 1 <= self.factor < math.inf:  # False for NaN as well
            raise ArgumentError(f"`factor` must be a number from 1 on. Got {self.factor}.", "model.rope_scaling")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor < math.inf:
            raise ArgumentError(
                "`low_frequency_factor` must be above 0 and below `high_frequency_factor`. "
                f"Got {self.low_frequency_factor} and {self.high_frequency_factor}.",
                "model.rope_scaling",
            )
        if self.kind == "none" and self.factor != 1:
            raise ArgumentError(
                f"`factor` needs a `kind` of scaling, linear or llama3. Got {self.factor} with none.",
                "model.rope_scaling",
            )

    def scale(self, frequencies: Float[Array, " half"]) -> Float[Array, " half"]:
        """Angles per position after stretching, from those before."""
        if self.kind == "none":
            return frequencies
        if self.kind == "linear":
            return frequencies / self.factor
        turns = self.original_positions * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies


def check_theta(name: str, theta: float, section: str) -> None:
    if not 1 < theta < math.inf:  # False for NaN as well
        raise ArgumentError(f"`{name}` must be a number above 1. Got {theta}.", section)


def rotate(
    x: Float[Array, "batch seq heads head_dim"],
    theta: float,
    positions: Int[Array, "batch seq"] | None = None,
    scaling: RopeScaling | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Turns feature pairs (i, i + head_dim / 2) by an angle that grows with the position: RoPE (arXiv 2104.09864).

    Attention then sees positions only through their differences, so a document may start anywhere in a window. Without
    `positions`, they are 0 to seq - 1.
    """
    _, seq, _, head_dim = x.shape
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequencies = scaling.scale(frequencies)
    places = jnp.arange(seq)[None] if positions is None else positions
    angles = places.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
