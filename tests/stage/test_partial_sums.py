"""Partial sums over examples: their values are right, layers' gradients are found, and nothing is communicated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.stage.partial_sums import PartialSums

EXAMPLES, LENGTH, WIDTH, PARTS = 8, 6, 4, 2


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def linear(params, x):
    return jnp.tanh(x @ params["w"] + params["b"]).sum()


def embedding(params, x):
    tokens = (x[..., 0] > 0).astype(int) + 2 * (x[..., 1] > 0)
    return (jnp.tanh(params["w"][tokens]) * x).sum()


def normalised(params, x):
    scale = params["b"].astype(jnp.bfloat16).astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    return jnp.square(centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) * scale).sum()


def attention(params, x):
    heads = x.reshape(-1, LENGTH, 2, 2)
    queries = jnp.einsum("bshd,dhe->bshe", heads, params["w"].reshape(2, 2, 4))
    scores = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", queries, queries))
    return jnp.square(jnp.einsum("bhqk,bkhe->bqhe", scores, queries)).sum()


def merged(params, x):
    return jnp.tanh(x.reshape(-1, WIDTH) @ params["w"] * 2.0 + params["b"]).sum()


def scanned_layers(params, x):
    stacked = jnp.stack([params["w"], 2 * params["w"], params["w"].T])
    run = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w + params["b"]), None))
    return jax.lax.scan(run, x, stacked)[0].sum()


def recurrent(params, x):
    def cell(hidden, token):
        hidden = jnp.tanh(hidden @ params["w"] + token + params["b"])
        return hidden, hidden

    hidden, outputs = jax.lax.scan(cell, jnp.zeros((len(x), WIDTH)), x.swapaxes(0, 1))
    return hidden.sum() + jnp.square(outputs).sum()


def factored(params, x):
    """The gradient passes through products whose leading dims happen to be as long as a microbatch."""
    wide, narrow = jnp.tile(params["w"], (2, 1)), jnp.tile(draw(WIDTH, 2, WIDTH)[:, 0], (2, 1))
    return jnp.tanh(x @ (narrow.T @ wide)).sum() + (x @ jnp.diag(params["b"])).sum()


def twice(params, x):
    return jnp.tanh(jax.jit(lambda v: v @ params["w"])(x) @ params["w"].T).sum()


def convolution(params, x):
    """With a stride, and dilated; then by channel."""
    kernel = params["w"].reshape(2, 4, 2)
    x = jax.lax.conv_general_dilated(
        x, kernel, (2,), "SAME", rhs_dilation=(2,), dimension_numbers=("NWC", "WIO", "NWC")
    )
    kernel, bias = params["b"].reshape(2, 1, 2), params["b"][:2]
    options = {"dimension_numbers": ("NWC", "WIO", "NWC"), "feature_group_count": 2}
    return jnp.square(jax.lax.conv_general_dilated(jnp.tanh(x + bias), kernel, (1,), "VALID", **options)).sum()


MODELS = [linear, embedding, normalised, attention, merged, scanned_layers, recurrent, factored, twice, convolution]


@pytest.fixture(params=MODELS, ids=lambda model: model.__name__)
def gradient(request):
    def flat(w, b, x):
        gradients = jax.grad(request.param)({"w": w, "b": b}, x)
        return [gradients["w"], gradients["b"]]

    arguments = draw(WIDTH, WIDTH), draw(WIDTH), draw(EXAMPLES, LENGTH, WIDTH)
    return flat, arguments


def test_partial_sums_are_those_of_the_examples(gradient):
    function, (w, b, x) = gradient
    sums = PartialSums(jax.make_jaxpr(function)(w, b, x), PARTS, EXAMPLES)
    assert sums.available == {0, 1}
    with jax.set_mesh(Mesh(np.array(jax.devices()[:PARTS]), ("data",))):
        partials = jax.jit(lambda *arguments: sums.run(arguments, {0, 1}))(w, b, x)
    for part in range(PARTS):
        own = slice(part * EXAMPLES // PARTS, (part + 1) * EXAMPLES // PARTS)
        for partial, expected in zip(partials, function(w, b, x[own]), strict=True):
            np.testing.assert_allclose(partial[part], expected, rtol=2e-5, atol=1e-5)


def test_no_device_needs_values_of_another(gradient):
    function, arguments = gradient
    mesh = Mesh(np.array(jax.devices()[:PARTS]), ("data",))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("data",)))
    shapes = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)
        for a, where in zip(arguments, (everywhere, everywhere, split), strict=True)
    ]
    sums = PartialSums(jax.make_jaxpr(function)(*arguments), PARTS, EXAMPLES)
    jitted = jax.jit(lambda *arguments: sums.run(arguments, {0, 1}), out_shardings=[split, split])
    with jax.set_mesh(mesh):
        text = jitted.lower(*shapes).compile().as_text()
    summed = jax.jit(function, out_shardings=[everywhere, everywhere]).lower(*shapes).compile().as_text()
    communicating = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
    assert not [word for word in communicating if f"{word}(" in text]
    assert "all-reduce(" in summed


def test_an_output_that_is_no_sum_over_examples_stays_whole():
    """A product needs a batch statistic as a whole, and a maximum over examples is no sum."""

    def run(w, x):
        return [(x - x.mean(0)).max(0) * w, jnp.square(x.sum(0)), x.sum(0)]

    closed = jax.make_jaxpr(run)(draw(WIDTH), draw(EXAMPLES, WIDTH))
    sums = PartialSums(closed, PARTS, EXAMPLES)
    assert sums.available == {2}
    values = sums.run((draw(WIDTH), draw(EXAMPLES, WIDTH)), set())
    for value, expected in zip(values, run(draw(WIDTH), draw(EXAMPLES, WIDTH)), strict=True):
        np.testing.assert_array_equal(value, expected)


def test_rounded_integers_stay_whole():
    """Rounding partial sums would change the result (half of 5, twice, is 4); integer counts are exact either way."""

    def run(x):
        counts = (x > -99).sum()
        return [x.sum().astype(jnp.int32), counts // 5, counts, counts.astype(jnp.float32), x.astype(jnp.uint8).sum()]

    x = jnp.full((EXAMPLES, 3), 1.06)
    sums = PartialSums(jax.make_jaxpr(run)(x), PARTS, EXAMPLES)
    assert {2, 3} <= sums.available <= {2, 3, 4}
    for value, expected in zip(sums.run((x,), sums.available), run(x), strict=True):
        np.testing.assert_array_equal(value.sum(0) if value.ndim else value, expected)


def test_a_sum_that_a_loop_carries_twice_stays_whole():
    def run(x):
        def body(carry, token):
            added = carry[0] + token.sum(0)
            return (added, added), None

        return list(jax.lax.scan(body, (jnp.zeros(WIDTH), jnp.zeros(WIDTH)), x.swapaxes(0, 1))[0])

    x = draw(EXAMPLES, LENGTH, WIDTH)
    sums = PartialSums(jax.make_jaxpr(run)(x), PARTS, EXAMPLES)
    for value, expected in zip(sums.run((x,), ()), run(x), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_a_sum_over_an_empty_array_has_partial_sums():
    x = draw(EXAMPLES, LENGTH, WIDTH)
    closed = jax.make_jaxpr(lambda x: [jnp.einsum("bij,bik->jk", x[:, :, :0], x)])(x)
    sums = PartialSums(closed, PARTS, EXAMPLES)
    (partials,) = sums.run((x,), sums.available)
    assert partials.shape == (PARTS, 0, WIDTH)
