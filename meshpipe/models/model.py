"""What a model configuration offers to training: its layers, its loss and its metrics."""

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from meshpipe.layers.layer import LayerLike
from meshpipe.models.reference import Reference

LayerConstructor = Callable[[nnx.Rngs], nnx.Module]
SumAndWeight = tuple[jax.Array, jax.Array]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Sizes of a model, and how to build it; subclass it for a model of your own."""

    input: ClassVar[str]
    """Batch field that the first layer is called with."""

    @abc.abstractmethod
    def layers(self) -> Sequence[LayerLike]:
        """Constructors of the layers in order, perhaps with how each is called (`meshpipe.named`, `reading`, `call`,
        `with_fields`); nothing is allocated until one is called.
        """

    @abc.abstractmethod
    def loss(self, output: Any, batch: Mapping[str, jax.Array], *args: Any, **kwargs: Any) -> SumAndWeight:
        """Sum of the losses of one microbatch's elements, and their number (or weight); both float32 scalars.

        Further parameters get the named outputs that they name.
        """

    def metrics(
        self, output: Any, batch: Mapping[str, jax.Array], *args: Any, **kwargs: Any
    ) -> dict[str, SumAndWeight]:
        """Further means to report in evaluation, each as a sum and a weight; it gets what a loss gets."""
        return {}

    def tokens(self, batch: Mapping[str, np.ndarray]) -> int | None:
        """Tokens of a batch, for the reported speed: the size of an input of integers [batch, seq]; else None."""
        inputs = batch[self.input]
        return inputs.size if inputs.ndim == 2 and np.issubdtype(inputs.dtype, np.integer) else None

    def notes(self, mesh: Mesh) -> Sequence[str]:
        """What the model chooses for the devices of a mesh, a sentence each, which `plan` and `train` print.

        Raises `ValueError` when they cannot run it; nothing has been traced or compiled by then.
        """
        return ()

    def limits(self) -> Mapping[str, int]:
        """Batch fields of whole numbers, such as tokens and labels, with the number that each of their values must be
        below; a run looks at some examples before it starts.
        """
        return {}

    def tied(self) -> tuple[tuple[str, ...], ...]:
        """Groups of leaf paths that are one parameter; the first path of a group owns it."""
        return ()

    def reference(self) -> Reference | None:
        """The model before it was cut into layers, for `meshpipe verify`; None compares with the layers themselves."""
        return None
