"""Models that predict the next token: what they read, their loss and their metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from meshpipe.mesh import TENSOR
from meshpipe.models.model import SumAndWeight
from meshpipe.models.transformer import TransformerConfig


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig(TransformerConfig):
    """What the configurations of all language models have."""

    input: ClassVar[str] = "inputs"

    vocab_size: int
    """Number of different tokens."""

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
        losses = optax.softmax_cross_entropy_with_integer_labels(output.astype(jnp.float32), batch["targets"])
        return (losses * batch["weights"]).sum(), batch["weights"].sum()

    def metrics(
        self, output: Float[Array, "batch seq vocab"], batch: Mapping[str, jax.Array]
    ) -> dict[str, SumAndWeight]:
        hits = output.argmax(axis=-1) == batch["targets"]
        return {"accuracy": ((hits * batch["weights"]).sum(), batch["weights"].sum())}
