"""Draws the next token of every text from the logits of the model."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt


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
        # From the largest on, which is 0: at a low temperature, others would be infinite with it.
        below = logits - logits.max(axis=-1, keepdims=True)
        scaled = below / jnp.where(temperature > 0, temperature, 1)[:, None]
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
