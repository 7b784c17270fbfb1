"""What a model configuration offers to training: its layers, its loss and its metrics."""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from flax import nnx

LayerConstructor = Callable[[nnx.Rngs], nnx.Module]
SumAndWeight = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Sizes of a model, and how to build it; subclass it for a model of your own."""

    input: ClassVar[str]
    """Batch field that the first layer is called with."""

    @abc.abstractmethod
    def layers(self) -> list[LayerConstructor]:
        """Constructors of the layers in order; nothing is allocated until one is called."""

    @abc.abstractmethod
    def loss(self, output: Any, batch: Mapping[str, jax.Array]) -> SumAndWeight:
        """Sum of the per-element losses of one microbatch, and the number (or weight) of elements; both float32 scalars."""

    def metrics(self, output: Any, batch: Mapping[str, jax.Array]) -> dict[str, SumAndWeight]:
        """Further means to report in evaluation, each as a sum and a weight."""
        return {}

    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of leaf paths that are one parameter; the first path of a group owns it."""
        return ()
