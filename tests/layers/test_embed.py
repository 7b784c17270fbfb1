"""Tables whose gradient is summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshpipe.adapters.adapted import KINDS, Adapter, cut_off, graft, kind_for
from meshpipe.layers.embed import Embed, look_up

OFTEN = 4096
"""How often one row is looked up. A sum of so many ones in bfloat16 would stop at 256."""


@pytest.mark.parametrize("table_dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_row_is_summed_in_float32(table_dtype: str) -> None:
    table, often = jnp.ones((3, 2), table_dtype), jnp.full((OFTEN,), 1)

    def total(table: jax.Array) -> jax.Array:
        return look_up(table, often, "bfloat16").astype("float32").sum()

    gradient = jax.grad(total)(table)
    assert gradient.dtype == table_dtype
    np.testing.assert_array_equal(gradient.astype("float32"), [[0, 0], [OFTEN, OFTEN], [0, 0]])


def test_it_looks_up_what_flax_does() -> None:
    ours, flax = (kind(5, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)) for kind in (Embed, nnx.Embed))
    inputs = jnp.asarray([[0, 4], [-1, 5]])  # counted from the end, and beyond it
    expected = flax(inputs).astype(jnp.float32)
    np.testing.assert_array_equal(ours(inputs).astype(jnp.float32), expected)
    found = jax.jvp(lambda table: look_up(table, inputs, jnp.bfloat16), (ours.embedding[...],), (jnp.ones((5, 3)),))
    np.testing.assert_array_equal(found[0].astype(jnp.float32), expected)
    with pytest.raises(ValueError, match="must be an integer"):
        ours(jnp.ones(2))


@pytest.mark.parametrize("kind", [Embed, nnx.Embed])
def test_an_adapter_fits_it_and_leaves_its_class(kind: type[nnx.Embed]) -> None:
    module = kind(5, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert kind_for(module) is kind
    graft(
        module,
        Adapter(nnx.LoRAParam(jnp.ones((5, 1))), nnx.LoRAParam(jnp.ones((1, 4))), scale=1.0, dropout=0.0, rngs=None),
    )
    assert type(module) is KINDS[kind]
    often, (graph, state) = jnp.full((OFTEN,), 1), nnx.split(module)
    gradient = jax.grad(lambda state: nnx.merge(graph, state)(often).astype("float32").sum())(state)
    np.testing.assert_array_equal(gradient.lora.lora_a[...].ravel(), [0, 4 * OFTEN, 0, 0, 0])
    if kind is Embed:
        np.testing.assert_array_equal(gradient.embedding[...][1], [OFTEN] * 4)
    cut_off(module)
    assert type(module) is kind
