"""The optimizer of a recipe and its learning-rate schedule."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import optax

from meshpipe.errors import check_clip_norm, check_number, check_whole
from meshpipe.optimizer.groups import REST, Groups, Kind, as_groups, check_groups, grouped


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule."""

    optimizer: Kind = "adamw"
    """AdamW (arXiv 1711.05101), or SGD with momentum."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    warmup_steps: int = 0
    """Number of updates over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine", "linear"] = "constant"
    """How the learning rate falls after the warm-up, to 0 at the last step; `constant` keeps it."""
    weight_decay: float = 0.0
    """Decoupled weight decay. Leaves with fewer than two dims (norms, biases) do not decay."""
    beta1: float = 0.9
    """AdamW's decay rate of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay rate of the mean squared gradient."""
    momentum: float = 0.0
    """SGD's momentum; 0 is plain SGD."""
    clip_norm: float | None = None
    """Largest global gradient norm; larger gradients are scaled down to it. None clips nothing."""
    groups: Groups = ()
    """Parameters, by patterns of their leaf paths, with a learning rate, weight decay or optimizer of their own:
    `layers/0:learning_rate=1e-4 bias:weight_decay=0,optimizer=sgd`. The first pattern that matches counts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", as_groups(self.groups))
        check_clip_norm(self.clip_norm)
        check_whole("warmup_steps", self.warmup_steps, 0, 2**31 - 1)
        for name in ("learning_rate", "weight_decay"):
            check_number(name, getattr(self, name))
        for name in ("beta1", "beta2", "momentum"):  # from 1 on, a mean is no mean any more
            check_number(name, getattr(self, name), below=1)

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate of each update, for a run of `steps` updates."""
        after = max(steps - self.warmup_steps, 1)
        decay: optax.Schedule
        if self.decay == "cosine":
            decay = optax.cosine_decay_schedule(self.learning_rate, after)
        elif self.decay == "linear":
            decay = optax.linear_schedule(self.learning_rate, 0.0, after)
        else:
            decay = optax.constant_schedule(self.learning_rate)
        warmup = optax.linear_schedule(0.0, self.learning_rate, self.warmup_steps + 1)
        if not self.warmup_steps:
            return decay
        return optax.join_schedules([lambda count: warmup(count + 1), decay], [self.warmup_steps])

    def build(self, steps: int) -> optax.GradientTransformation:
        """The Optax transformation, without clipping, which needs the norm over all stages."""
        rest = replace(self, groups=())
        if self.groups:
            groups = as_groups(self.groups)
            own = {str(number): replace(rest, **group.changes) for number, group in enumerate(groups)}
            return grouped(groups, {name: one.build(steps) for name, one in {**own, REST: rest}.items()})
        rate = self.schedule(steps)
        if self.optimizer == "adamw":
            return optax.adamw(rate, self.beta1, self.beta2, weight_decay=self.weight_decay, mask=matrices)
        decay = optax.add_decayed_weights(self.weight_decay, mask=matrices) if self.weight_decay else optax.identity()
        return optax.chain(decay, optax.sgd(rate, momentum=self.momentum or None))

    def check(self, trained: Iterable[str]) -> None:
        """Raises `ArgumentError` for a group without a parameter; `trained` has the paths of those that are trained."""
        check_groups(as_groups(self.groups), trained)


def matrices(params: Any) -> Any:
    """True for the leaves that decay: those with two or more dims."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)
