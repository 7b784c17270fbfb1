"""The loss and the accuracy of models that choose among classes, such as tokens."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from meshpipe.models.model import SumAndWeight


def cross_entropy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], weights: Float[Array, "*batch"] | None = None
) -> SumAndWeight:
    """The sum of the losses in nats, and their number, or the sum of their weights."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    if weights is None:
        return losses.sum(), jnp.float32(losses.size)
    return (losses * weights).sum(), weights.sum()


def accuracy(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], weights: Float[Array, "*batch"] | None = None
) -> dict[str, SumAndWeight]:
    """How many labels are the class with the highest logit, as the metric `accuracy`."""
    hits = logits.argmax(axis=-1) == labels
    if weights is None:
        return {"accuracy": (hits.sum(dtype=jnp.float32), jnp.float32(hits.size))}
    return {"accuracy": ((hits * weights).sum(), weights.sum())}
