"""Draws the next token of every text from the logits of the model."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

from meshpipe.errors import ArgumentError, check_seed, check_whole

LENGTH_LIMIT = 2**24
"""The number of tokens must be below this."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose each next token; by default the most likely one."""

    max_tokens: int = 64
    """Tokens to add to a prompt, at most."""
    temperature: float = 0.0
    """Logits are divided by it before a token is drawn. 0 takes the most likely token."""
    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the most likely tokens whose probabilities add up to at least this; 1 draws from all."""
    seed: int = 0
    """Seed of the draws. They depend on it, on the number of the prompt and on the position, not on the layout."""
    stop_tokens: tuple[int, ...] = ()
    """Token ids that end a text; they are not part of it."""

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, below=LENGTH_LIMIT)
        check_whole("top_k", self.top_k, 0, LENGTH_LIMIT)
        check_seed(self.seed)
        if not 0 <= self.temperature < math.inf:
            raise ArgumentError(f"`temperature` must be 0 or a number above it. Got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"`top_p` must be above 0 and at most 1. Got {self.top_p}. 1 leaves no token out.")
        for token in self.stop_tokens:
            check_whole("stop_tokens", token, 0)


def sample(
    logits: Float[Array, "batch vocab"],
    positions: Int[Array, " batch"],
    *,
    seed: UInt[Array, " batch"],
    request: UInt[Array, " batch"],
    temperature: Float[Array, " batch"],
    top_k: Int[Array, " batch"],
    top_p: Float[Array, " batch"],
) -> Int[Array, " batch"]:
    """The token after `positions` in every text. A row with temperature 0 gets its most likely token.

    What it draws depends on the seed, the number of the request and the position alone.
    """
    logits = logits.astype(jnp.float32)

    def greedy() -> jax.Array:
        return logits.argmax(axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1)[:, None]
        restricted = (top_k > 0).any() | (top_p < 1).any()
        kept = jax.lax.cond(restricted, lambda: _restrict(scaled, top_k, top_p), lambda: scaled)
        keys = jax.vmap(_key)(seed, request, positions)
        tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(temperature > 0, tokens, greedy())

    return jax.lax.cond((temperature > 0).any(), drawn, greedy)


def _restrict(
    logits: Float[Array, "batch vocab"], top_k: Int[Array, " batch"], top_p: Float[Array, " batch"]
) -> Float[Array, "batch vocab"]:
    """The logits with all others at minus infinity: first to the most likely `top_k`, then, of these, to the fewest
    that have the probability `top_p`.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where((before < top_p[:, None]) | (rank == 0), ranked, -jnp.inf)
    return jax.vmap(lambda row, places, values: row.at[places].set(values))(logits, order, ranked)


def _key(seed: jax.Array, request: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), request), position)
