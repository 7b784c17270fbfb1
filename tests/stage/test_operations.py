"""Operations counted in traced programs."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from meshpipe.stage.operations import count_bytes, count_operations
from meshpipe.stage.products_of_step import count_products

X, W = jnp.ones((4, 8)), jnp.ones((8, 8))
PRODUCT = 2 * 4 * 8 * 8


def repeated(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]


def either(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.cond(x[0, 0].astype(jnp.int32) > 0, lambda: x @ w @ w, lambda: x @ w)


def convolved(x: jax.Array, w: jax.Array) -> jax.Array:
    kernel = jnp.ones((3, 8, 8))  # 3 wide, 8 features in, 8 out
    return jax.lax.conv_general_dilated(x[None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x, w: x @ w, PRODUCT),
        (lambda x, w: jnp.einsum("bi,ij->bj", x, w), PRODUCT),
        (lambda x, w: x.T.reshape(4, 8)[:, ::2], 0),
        (lambda x, w: x + 1, 4 * 8),
        (lambda x, w: x.sum(), 4 * 8),
        (lambda x, w: x.astype(jnp.int32) + 1, 0),
        (jax.jit(lambda x, w: x @ w), PRODUCT),
        (repeated, 5 * PRODUCT),
        (either, 2 * PRODUCT),
        (convolved, 3 * PRODUCT),
    ],
)
def test_operations(function: Callable[..., Any], count: int) -> None:
    assert count_operations(jax.make_jaxpr(function)(X, W)) == count


@pytest.mark.parametrize(
    ("function", "counts"),
    [
        (lambda x, w: jnp.tanh(x @ w) + x.sum(), {"float32": PRODUCT}),
        (lambda x, w: (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)) @ w, {"bfloat16": PRODUCT, "float32": PRODUCT}),
        (jax.jit(repeated), {"float32": 5 * PRODUCT}),
        (either, {"float32": 2 * PRODUCT}),
        (convolved, {"float32": 3 * PRODUCT}),
        (lambda x, w: x + 1, {}),
    ],
)
def test_products_are_counted_by_dtype(function: Callable[..., Any], counts: dict[str, int]) -> None:
    assert count_products(jax.make_jaxpr(function)(X, W)) == counts


@pytest.mark.parametrize(
    ("function", "of", "count"),
    [
        (lambda x, w: x @ w, (), 1),
        (lambda x, w: x @ w, (1,), 2),
        (lambda x, w: x @ w, (0, 1), 3),
        (lambda x, w: (x @ w) @ jax.lax.stop_gradient(w), (1,), 2 + 2),
        (lambda x, w: (x @ w) @ w, (1,), 2 + 3),
        (jax.jit(repeated), (0,), 2 * 5),
        (jax.jit(repeated), (1,), 3 * 5),  # all iterations but the first continue values that depend on w
        (jax.checkpoint(either), (0,), 2 * 2),
        (convolved, (0, 1), 2 * 3),  # its kernel is a constant
        (lambda x, w: jnp.sign(x).astype(jnp.int32).astype(jnp.float32) @ w, (0,), 1),  # none through integers
    ],
)
def test_products_of_gradients_that_are_made(function: Callable[..., Any], of: tuple[int, ...], count: int) -> None:
    jaxpr = jax.make_jaxpr(function)(X, W).jaxpr
    found = count_products(jaxpr, [jaxpr.invars[i] for i in of])["float32"]
    assert found == count * PRODUCT


WHOLE = 4 * (4 * 8 + 8 * 8 + 4 * 8)
"""Float32 of the program's inputs and output; a product reads and writes as much."""


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x, w: x @ w, 2 * WHOLE),
        (lambda x, w: jnp.tanh(x @ w) + 1, 2 * WHOLE),  # the rest is fused
        (repeated, 6 * WHOLE),
        (either, 3 * WHOLE),
    ],
)
def test_bytes(function: Callable[..., Any], count: int) -> None:
    assert count_bytes(jax.make_jaxpr(function)(X, W)) == count


def test_fused_attention_counts_as_its_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for an NVIDIA GPU, whose versions are not asked for."""
    cudnn = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    query, key = (jax.ShapeDtypeStruct((2, seq, 4, 64), jnp.bfloat16) for seq in (128, 256))

    def forward(kind: str) -> Callable[..., Any]:
        attend = functools.partial(jax.nn.dot_product_attention, implementation=kind)
        return lambda q, k: jax.vjp(lambda q, k: attend(q, k, k), q, k)[0]

    counts = {kind: count_products(jax.make_jaxpr(forward(kind))(query, key)) for kind in ("xla", "cudnn")}
    assert counts["cudnn"] == {"bfloat16": 2 * 2 * 2 * 4 * 128 * 256 * 64}
    assert sum(counts["xla"].values()) == sum(counts["cudnn"].values())
