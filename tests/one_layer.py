"""One layer by itself: its shapes filled with ones, and its call."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.layer import Layer, LayerLike, Randomness

FIELDS = ("inputs", "mask", "targets")
X = np.ones((2, 4), np.float32)


def layer_of(layer: LayerLike, fields: tuple[str, ...] = FIELDS) -> Layer:
    return abstract_layers([layer], fields)[0]


def values(shapes: Any) -> dict[str, jax.Array]:
    return {path: jnp.ones(shape.shape, shape.dtype) for path, shape in shapes.items()}


def draws(seed: int = 0, step: int = 0, microbatch: int = 0) -> Randomness:
    return Randomness(jax.random.key_data(jax.random.key(seed)), jnp.uint32(step), jnp.uint32(microbatch))


def call(
    layer: Layer, x: Any = X, *, train: bool = True, batch: Any = None, randomness: Randomness | None = None
) -> Any:
    return layer(values(layer.params), values(layer.state), x, batch or {}, randomness or draws(), train=train)[:2]
