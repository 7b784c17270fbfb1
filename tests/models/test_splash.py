"""Pallas's attention is XLA's, for every mask; its kernel is interpreted on CPU devices."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from meshpipe.models.attention import attend
from meshpipe.models.splash import splash_attention
from meshpipe.stage.operations import count_operations


class Case(NamedTuple):
    queries: int = 200
    """Not a multiple of what the kernel works on: it pads."""
    keys: int = 200
    kv_heads: int = 2
    causal: bool = True
    documents: bool = False
    window: int | None = None
    softcap: float | None = None
    split: bool = False
    """Whether examples and heads are split over devices."""
    dtype: str = "float32"


HEADS, HEAD_DIM = 4, 16
CASES = {
    "causal": Case(queries=128, keys=128),
    "documents": Case(documents=True),
    "window": Case(window=50, documents=True),
    "softcap": Case(softcap=5.0),
    "cross": Case(keys=130, causal=False),
    "window both ways": Case(causal=False, window=20, documents=True),
    "more queries than keys": Case(keys=130),
    "split": Case(split=True, documents=True),
    "split, one head of keys": Case(split=True, kv_heads=1),
    "bfloat16": Case(documents=True, dtype="bfloat16"),
}


def operands(case: Case) -> tuple[list[jax.Array], jax.Array, dict[str, Any]]:
    shapes = [(case.queries, HEADS), (case.keys, case.kv_heads), (case.keys, case.kv_heads), (case.queries, HEADS)]
    draws = np.random.default_rng(0)
    *inputs, weights = (jnp.asarray(draws.normal(size=(2, *shape, HEAD_DIM)), case.dtype) for shape in shapes)
    ids = jnp.asarray(np.sort(draws.integers(0, 4, (2, case.queries)), axis=1), jnp.int32)
    options = {"causal": case.causal, "window": case.window, "softcap": case.softcap, "scale": None}
    return inputs, weights, options | {"segment_ids": ids if case.documents else None}


def values_and_gradients(attention: Any, inputs: list[jax.Array], weights: jax.Array) -> list[np.ndarray]:
    def loss(*inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
        mixed = attention(*inputs)
        return (mixed * weights).astype(jnp.float32).sum(), mixed

    gradients, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*inputs)
    return [np.asarray(x, np.float32) for x in (mixed, *gradients)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_xla_computes(name: str) -> None:
    case = CASES[name]
    inputs, weights, options = operands(case)
    expected = values_and_gradients(partial(attend, **options, implementation="xla"), inputs, weights)
    shape = (2, 2) if case.split else (1, 1)
    devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
    with jax.set_mesh(Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)):
        found = values_and_gradients(partial(splash_attention, **options, interpret=True), inputs, weights)
    # Relative to the largest value. Scores, weights and the gradients of both are sums of HEAD_DIM and of `keys`
    # products of operands that were rounded: each is off by at most its number of terms times the unit roundoff of
    # float32, and four of them follow one another. With bfloat16, the operands of each product are rounded to it:
    # queries, weights, gradients of scores, the results.
    unit = jnp.finfo(jnp.float32).eps / 2
    bound = 4 * (HEAD_DIM + case.keys) * unit
    if case.dtype == "bfloat16":
        bound += 4 * float(jnp.finfo(jnp.bfloat16).eps)
    for mine, plain in zip(found, expected, strict=True):
        assert np.abs(mine - plain).max() <= bound * np.abs(plain).max()


def test_its_operations_are_counted_as_those_of_xla() -> None:
    """All of its grid, in which it skips what the mask leaves out; it also computes a softmax for every block."""
    shape = jax.ShapeDtypeStruct((2, 1024, HEADS, 128), jnp.bfloat16)
    options: Any = {"causal": False, "window": None, "softcap": None, "scale": None, "segment_ids": None}
    counts = [
        count_operations(jax.make_jaxpr(partial(attention, **options))(shape, shape, shape))
        for attention in (splash_attention, partial(attend, implementation="xla"))
    ]
    assert 0.9 < counts[0] / counts[1] < 1.15
