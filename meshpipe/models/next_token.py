"""Models that predict the next token: what they read, their loss and their metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from meshpipe.mesh import TENSOR
from meshpipe.models.classification import accuracy, cross_entropy
from meshpipe.models.model import LayerConstructor, SumAndWeight
from meshpipe.models.stored import Stored
from meshpipe.models.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig(TransformerConfig):
    """What the configurations of all language models have."""

    input: ClassVar[str] = "inputs"

    vocab_size: int
    """Number of different tokens."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of computation; bfloat16 is for accelerators."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters. bfloat16 halves their memory, for models that are frozen, as below adapters, or only
    used: where they are trained, small updates are lost to rounding."""

    def stored(self, layers: Sequence[LayerConstructor]) -> list[LayerConstructor]:
        """The layers with their parameters in `param_dtype`."""
        if self.param_dtype == "float32":
            return list(layers)
        made = {id(layer): Stored(layer, self.param_dtype) for layer in layers}  # one for blocks that are alike
        return [made[id(layer)] for layer in layers]

    def notes(self, mesh: Mesh) -> list[str]:
        notes = super().notes(mesh)
        if self.vocab_size % 2 and mesh.shape.get(TENSOR, 1) > 1:
            notes.append(
                f"The tensor axis does not split the {self.vocab_size} tokens of the vocabulary, which are odd."
            )
        return notes

    def limits(self) -> dict[str, int]:
        return {"inputs": self.vocab_size, "targets": self.vocab_size}

    def loss(self, output: Float[Array, "batch seq vocab"], batch: Mapping[str, jax.Array]) -> SumAndWeight:
        return cross_entropy(output, batch["targets"], batch["weights"])

    def metrics(
        self, output: Float[Array, "batch seq vocab"], batch: Mapping[str, jax.Array]
    ) -> dict[str, SumAndWeight]:
        return accuracy(output, batch["targets"], batch["weights"])
