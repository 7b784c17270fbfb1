"""Rotary positions (RoPE), and how models stretch them beyond the length that they were trained on."""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from meshpipe.errors import ArgumentError, check_positive, check_whole


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the wavelengths of rotary positions are stretched for longer texts."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """`linear` stretches all wavelengths (arXiv 2306.15595); `llama3` only long ones, as Llama 3.1 does
    (arXiv 2407.21783, section 3.4.2); `yarn` as well, with larger attention scores (arXiv 2309.00071)."""
    factor: float = 1.0
    """By how much they are stretched."""
    low_frequency_factor: float = 1.0
    """For `llama3`: wavelengths above original_positions / this are stretched by the whole factor."""
    high_frequency_factor: float = 4.0
    """For `llama3`: wavelengths below original_positions / this stay; those between are partly stretched."""
    original_positions: int = 8192
    """For `llama3` and `yarn`: the number of positions that the model was trained on at first."""
    beta_fast: float = 32.0
    """For `yarn`: wavelengths that turn more often than this in original_positions stay."""
    beta_slow: float = 1.0
    """For `yarn`: wavelengths that turn less often than this are stretched by the whole factor; those between are
    partly stretched."""
    truncate: bool = True
    """For `yarn`: whether these bounds are moved outwards, to whole pairs of features."""
    attention_factor: float | None = None
    """For `yarn`: queries and keys are multiplied by this; None is 0.1 * ln(factor) + 1."""

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
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ArgumentError(
                f"`beta_slow` must be above 0 and below `beta_fast`. Got {self.beta_slow} and {self.beta_fast}.",
                "model.rope_scaling",
            )
        if self.attention_factor is not None:
            check_positive("attention_factor", self.attention_factor, section="model.rope_scaling")
        for name, kinds in _KINDS.items():
            if self.kind not in kinds and getattr(self, name) != getattr(RopeScaling, name):
                raise ArgumentError(
                    f"`{name}` is for a `kind` of {' or '.join(kinds)}. Got {getattr(self, name)} with {self.kind}.",
                    "model.rope_scaling",
                )
        if self.kind == "none" and self.factor != 1:
            raise ArgumentError(
                f"`factor` needs a `kind` of scaling: linear, llama3 or yarn. Got {self.factor} with none.",
                "model.rope_scaling",
            )

    def scale(self, frequencies: Float[Array, " half"], theta: float) -> Float[Array, " half"]:
        """Angles per position after stretching, from those before, which have the base `theta`."""
        if self.kind == "none":
            return frequencies
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "yarn":
            first, last = self._bounds(theta, frequencies.size)
            kept = 1 - jnp.clip((jnp.arange(frequencies.size) - first) / (last - first), 0, 1)
        else:
            turns = self.original_positions * frequencies / (2 * math.pi)
            low, high = self.low_frequency_factor, self.high_frequency_factor
            kept = jnp.clip((turns - low) / (high - low), 0, 1)
        return (1 - kept) * frequencies / self.factor + kept * frequencies

    def _bounds(self, theta: float, half: int) -> tuple[float, float]:
        """The pairs of features, counted from 0, from which on `yarn` stretches and from which on it does so wholly."""
        first, last = (
            half * math.log(self.original_positions / (2 * math.pi * turns)) / math.log(theta)
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = float(math.floor(first)), float(math.ceil(last))
        first, last = max(first, 0.0), min(last, 2.0 * half - 1)
        return first, last if last != first else first + 0.001

    @property
    def magnitude(self) -> float:
        """What queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor


_KINDS = {
    **dict.fromkeys(("low_frequency_factor", "high_frequency_factor"), ("llama3",)),
    **dict.fromkeys(("beta_fast", "beta_slow", "truncate", "attention_factor"), ("yarn",)),
    "original_positions": ("llama3", "yarn"),
}
"""Fields that only some kinds of scaling have."""


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
        frequencies = scaling.scale(frequencies, theta)
    places = jnp.arange(seq)[None] if positions is None else positions
    angles = places.astype(jnp.float32)[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if scaling is not None and scaling.magnitude != 1:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
