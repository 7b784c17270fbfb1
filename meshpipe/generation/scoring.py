"""The score of a continuation, from the logits of the model."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

PLACES, TARGETS, COUNT = "score_places", "score_targets", "score_count"
"""Batch fields: where the logits of the tokens of a continuation are, the tokens, and how many there are."""


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its context."""

    logprob: float
    """The sum of the log-probabilities of its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


def score_continuations(
    module: Any,
    x: Float[Array, "batch seq embed"],
    *,
    score_places: Int[Array, "batch width"],
    score_targets: Int[Array, "batch width"],
    score_count: Int[Array, " batch"],
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """Calls the last layer at the positions of the continuations alone. Returns `Score.logprob` and `is_greedy`."""
    rows = jnp.take_along_axis(x, score_places[:, :, None], axis=1)
    logits = module(rows).astype(jnp.float32)
    counts = jnp.arange(score_targets.shape[1]) < score_count[:, None]
    of_targets = jnp.take_along_axis(logits, score_targets[:, :, None], axis=2)[:, :, 0]
    logprobs = of_targets - jax.nn.logsumexp(logits, axis=2)
    is_best = logits.argmax(axis=2) == score_targets
    return jnp.where(counts, logprobs, 0).sum(axis=1), (is_best | ~counts).all(axis=1)
