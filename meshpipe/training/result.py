"""What an update found: its scalars, or that something is not finite."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax

from meshpipe.observe.clock import MeasuredStep
from meshpipe.sharding import local_value


class NonFiniteError(FloatingPointError):
    """The loss, a gradient or a parameter is not finite."""

    def __init__(self, message: str, step: int, *, left_out: bool) -> None:
        super().__init__(message)
        self.step = step
        """The first step that is not finite, or the step that was left out because of one before it."""
        self.left_out = left_out
        """Whether the update was left out, so that the trainer is as it was before `step` and can go on."""


@dataclass(frozen=True, repr=False)
class StepResult:
    """One update's scalars, still on their devices; `float()` and `repr()` wait for them."""

    step: int
    """Number of the update, from 1."""
    loss: jax.Array
    """Mean loss over the whole batch. Its gradient, and that of `terms`, made the update."""
    grad_norm: jax.Array
    """Global norm of the gradient before clipping."""
    good: jax.Array
    """False when the loss, a term or the norm of this step, or of a step before it that was not yet checked, is not
    finite; the update was then left out."""
    applied: jax.Array
    """False when the update was left out: it was not finite, or the weight of the whole batch is 0."""
    finite: dict[int, jax.Array]
    """For each local stage, whether its parameters are finite after the update."""
    measured: MeasuredStep | None = None
    """When each action ran, if the step was measured."""
    terms: Mapping[str, jax.Array] = field(default_factory=dict)
    """What layers add to the loss (`LossTerm`), by name: sums over the whole batch, divided by the weight of the loss.
    They are not part of `loss`. Every process has all of them."""
    metrics: Mapping[str, jax.Array] = field(default_factory=dict)
    """Means of the scalars that layers sow as `nnx.Intermediate`, by name. Every process has all of them."""

    def __repr__(self) -> str:
        loss, norm = (float(local_value(value)) for value in (self.loss, self.grad_norm))
        terms = "".join(f"{name} {float(local_value(value)):.6g}, " for name, value in self.terms.items())
        found = f"StepResult(step {self.step}: loss {loss:.6g}, {terms}gradient norm {norm:.4g}"
        if local_value(self.applied):
            return f"{found})"
        return f"{found}, left out: {'weight 0' if local_value(self.good) else 'not finite'})"
