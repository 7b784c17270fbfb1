"""A table of features whose gradient is summed in float32, whatever a model computes in."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def look_up(table: jax.Array, inputs: Any, dtype: Any) -> jax.Array:
    """Rows of a table, `[rows, features]`, cast to `dtype`: an array `[*inputs.shape, features]`.

    The gradient of a row is a sum with one term for each time that it is looked up, often thousands. It is summed in
    float32, or in the table's dtype if that is wider. The derivative of `jnp.take` on a table that was cast would
    round to `dtype` after each term.
    """
    return jnp.take(table, inputs, axis=0).astype(dtype)


@look_up.defjvp
def _look_up_jvp(dtype: Any, primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    (table, inputs), (change, _) = primals, tangents
    wide = jnp.promote_types(table.dtype, jnp.float32)
    changes = jnp.take(change.astype(wide), inputs, axis=0, fill_value=0).astype(dtype)
    # Training casts the table first, which is done once per step: a fully sharded one then stays gathered as its cast.
    return jnp.take(table.astype(dtype), inputs, axis=0), changes


class Embed(nnx.Embed):
    """An `nnx.Embed` whose gradient is summed in float32, also with `dtype` bfloat16."""

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        if self.num_embeddings == 1 or out_sharding is not None or not jnp.issubdtype(inputs.dtype, jnp.integer):
            return super().__call__(inputs, out_sharding)
        return look_up(self.embedding[...], inputs, self.dtype)
