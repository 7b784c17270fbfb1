"""Layers whose parameters are kept in another dtype than they are drawn in."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class Stored:
    """Makes the module of a layer, with all of its floating parameters in a dtype."""

    make: Callable[..., nnx.Module]
    dtype: str

    def __call__(self, rngs: nnx.Rngs) -> nnx.Module:
        module = self.make(rngs=rngs)
        nnx.update(module, jax.tree.map(self._stored, nnx.state(module, nnx.Param)))
        return module

    def _stored(self, value: jax.Array) -> jax.Array:
        return value.astype(self.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else value
