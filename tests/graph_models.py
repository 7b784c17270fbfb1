"""Small models that are no chains, each as a list of layers and, written by hand, as one function of its leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meshpipe import call, named, reading, sows, with_fields

WIDTH, SEQ, BATCH, MICROBATCHES = 4, 4, 16, 4


class Dense(nnx.Module):
    """`tanh` of a product, so that no gradient is a constant."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.linear(x))


class Join(Dense):
    def __call__(self, x: jax.Array, early: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.linear(x)) * early


class Sowing(Dense):
    """Sows its branch, and how large that is."""

    def __call__(self, x: jax.Array) -> jax.Array:
        branch = jnp.tanh(self.linear(x))
        self.sow(nnx.Intermediate, "branch", branch)
        self.sow(nnx.Intermediate, "size", (branch**2).mean())
        return x + branch


class Cross(Dense):
    """Attends to the memory."""

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        scores = jax.nn.softmax(self.linear(x) @ memory.swapaxes(-1, -2), axis=-1)
        return x + scores @ memory


class Down(Dense):
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(x.reshape(len(x), -1, 2, WIDTH).mean(2)))


class Up(Dense):
    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(jnp.repeat(x, 2, axis=1) + 2 * skip))


class Residual(nnx.Module):
    """Attends, per position, to its input and to the earlier outputs that exist."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.query = nnx.Param(rngs.normal((WIDTH,)))

    def __call__(self, x: jax.Array, first: Any = None, second: Any = None, third: Any = None) -> jax.Array:
        values = jnp.stack([jnp.sin(x), *(v for v in (first, second, third) if v is not None)])
        return jnp.tanh(
            self.linear(jnp.einsum("n...,n...d->...d", jax.nn.softmax(values @ self.query[...], 0), values))
        )


def squares(output: jax.Array, batch: Any) -> Any:
    """Of uneven weights; in the first microbatches nothing counts."""
    found = ((output - batch["goal"]) ** 2).mean((1, 2))
    return (found * batch["weight"]).sum(), batch["weight"].sum()


def contrastive(output: jax.Array, batch: Any, image: jax.Array) -> Any:
    """Every text against every image of the microbatch."""
    scores = image.reshape(len(image), -1) @ output.reshape(len(output), -1).T
    losses = -jnp.diagonal(jax.nn.log_softmax(scores, axis=-1)) * batch["weight"]
    return losses.sum(), batch["weight"].sum()


def with_early(output: jax.Array, batch: Any, *, side: jax.Array) -> Any:
    total, weight = squares(output, batch)
    return total + 0.3 * squares(side, batch)[0], weight


@dataclass(frozen=True)
class GraphModel:
    layers: Callable[[], list[Any]]
    plain: Callable[[Callable[..., jax.Array], dict[str, jax.Array], dict[str, jax.Array]], Any]
    """`plain(linear, leaves, batch)` is the sum of the losses and the weight; `linear(i, x)` is the product of the
    layer `i`."""
    loss: Callable[..., Any] = squares


def _dense(linear: Any, i: int, x: Any) -> Any:
    return x + jnp.tanh(linear(i, x))


def _skip(linear: Any, leaves: Any, batch: Any) -> Any:
    early = _dense(linear, 0, batch["inputs"])
    x = _dense(linear, 2, _dense(linear, 1, early))
    return squares(x + jnp.tanh(linear(3, x)) * early, batch)


def _cross(linear: Any, i: int, x: Any, memory: Any) -> Any:
    scores = jnp.einsum("bqd,bkd->bqk", linear(i, x), memory)
    return x + jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores, axis=-1), memory)


def _encoder_decoder(linear: Any, leaves: Any, batch: Any) -> Any:
    memory = _dense(linear, 2, _dense(linear, 1, _dense(linear, 0, batch["inputs"])))
    x = _dense(linear, 3, batch["targets"])
    for i in (4, 5, 6, 7):
        x = _cross(linear, i, x, memory)
    return squares(x, batch)


def _down(linear: Any, i: int, x: Any) -> Any:
    return jnp.tanh(linear(i, (x[:, ::2] + x[:, 1::2]) / 2))


def _up(linear: Any, i: int, x: Any, skip: Any) -> Any:
    return jnp.tanh(linear(i, jnp.stack([x, x], axis=2).reshape(skip.shape) + 2 * skip))


def _unet(linear: Any, leaves: Any, batch: Any) -> Any:
    outer = _dense(linear, 0, batch["inputs"])
    inner = _down(linear, 1, outer)
    x = _dense(linear, 3, _down(linear, 2, inner))
    x = _up(linear, 4, x, inner)
    x = _up(linear, 6, _dense(linear, 5, x), outer)
    return squares(_dense(linear, 7, x), batch)


def _two_towers(linear: Any, leaves: Any, batch: Any) -> Any:
    image = _dense(linear, 1, _dense(linear, 0, batch["inputs"]))
    text = _dense(linear, 3, _dense(linear, 2, batch["targets"]))
    return contrastive(text, batch, image)


def _residuals(linear: Any, leaves: Any, batch: Any) -> Any:
    values = [_dense(linear, 0, batch["inputs"])]
    for i in (1, 2, 3):
        # The input of a block is the output of the one before it, and it reads that by its name too.
        stacked = jnp.stack([jnp.sin(values[-1]), *values])
        weights = jax.nn.softmax((stacked * leaves[f"layers/{i}/query"]).sum(-1), axis=0)
        values.append(jnp.tanh(linear(i, (weights[..., None] * stacked).sum(0))))
    return squares(values[-1], batch)


def _two_stages(linear: Any, leaves: Any, batch: Any) -> Any:
    early = x = _dense(linear, 0, batch["inputs"])
    for i in (1, 2, 3):
        x = x + jnp.tanh(linear(i, x)) * early
    return squares(x, batch)


def _loss_alone(linear: Any, leaves: Any, batch: Any) -> Any:
    trunk = _dense(linear, 0, batch["inputs"])
    side = _dense(linear, 1, trunk)
    return with_early(_dense(linear, 3, _dense(linear, 2, trunk)), batch, side=side)


def with_branch(output: jax.Array, batch: Any, *, early: jax.Array, late: jax.Array, size: jax.Array) -> Any:
    total, weight = squares(output, batch)
    return total + 0.3 * squares(early * late, batch)[0] + 0.1 * size, weight


def _sown(linear: Any, leaves: Any, batch: Any) -> Any:
    early = jnp.tanh(linear(0, batch["inputs"]))
    x = batch["inputs"] + early
    x = x + jnp.tanh(linear(1, x)) * early
    size = (jnp.tanh(linear(2, x)) ** 2).mean()
    x = _dense(linear, 2, x)
    late = jnp.tanh(linear(3, x))
    return with_branch(x + late, batch, early=early, late=late, size=size)


MODELS = {
    "skip": GraphModel(lambda: [named("early", Dense), Dense, Dense, Join], _skip),
    "encoder-decoder": GraphModel(
        lambda: [Dense, Dense, named("memory", Dense), reading("targets", Dense), *[Cross] * 4], _encoder_decoder
    ),
    "unet": GraphModel(
        lambda: [
            named("outer", Dense),
            named("inner", Down),
            Down,
            Dense,
            with_fields(Up, skip="inner"),
            Dense,
            with_fields(Up, skip="outer"),
            Dense,
        ],
        _unet,
    ),
    "two towers": GraphModel(
        lambda: [Dense, named("image", Dense), reading("targets", Dense), Dense], _two_towers, contrastive
    ),
    "block residuals": GraphModel(
        lambda: [named("first", Dense), named("second", Residual), named("third", Residual), Residual], _residuals
    ),
    "two stages of a rank": GraphModel(
        lambda: [
            named("early", Dense),
            Join,
            call(Dense, lambda dense, x, early: Join.__call__(dense, x, early)),
            Join,
        ],
        _two_stages,
    ),
    "only the loss": GraphModel(
        lambda: [named("trunk", Dense), named("side", Dense), reading("trunk", Dense), Dense], _loss_alone, with_early
    ),
    "sown": GraphModel(
        lambda: [
            sows(Sowing, early="branch"),
            Join,
            sows(Sowing, "size"),
            sows(Sowing, late="branch"),
        ],
        _sown,
        with_branch,
    ),
}


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        weight = rng.uniform(0.1, 2.0, BATCH).astype(np.float32)
        weight[: BATCH // MICROBATCHES] = 0
        rows = {name: rng.normal(size=(BATCH, SEQ, WIDTH)).astype(np.float32) for name in ("inputs", "targets", "goal")}
        made.append({**rows, "weight": weight})
    return made


def plain_loss_and_gradients(model: GraphModel, params: dict[str, jax.Array], batch: Any) -> Any:
    """The mean loss and its gradients, with `jax.grad` of the function that is written by hand."""

    def mean(params: dict[str, jax.Array]) -> jax.Array:
        def linear(i: int, x: jax.Array) -> jax.Array:
            return x @ params[f"layers/{i}/linear/kernel"] + params[f"layers/{i}/linear/bias"]

        parts = {name: v.reshape(MICROBATCHES, -1, *v.shape[1:]) for name, v in batch.items()}
        totals, weights = jax.vmap(lambda part: model.plain(linear, params, part))(parts)
        return totals.sum() / weights.sum()

    return jax.jit(jax.value_and_grad(mean))(params)
