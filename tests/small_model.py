"""Tiny layers for tests, together with everything that a stage may hold: batch statistics, dropout, a boundary of
several values, an integer among them, batch fields as keywords, and a layer without parameters.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = 8
SPLIT = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "hidden"))
JOIN = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("hidden", "embed"))


class Enter(nnx.Module):
    """Points -> points and the index of the largest coordinate."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> dict[str, jax.Array]:
        return {"x": self.linear(inputs), "largest": jnp.argmax(inputs, axis=-1)}


class Mix(nnx.Module):
    """A residual block with batch statistics and dropout that looks at the batch field `shift`."""

    def __init__(self, rngs: nnx.Rngs, rate: float = 0.2):
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, kernel_init=SPLIT, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, kernel_init=JOIN, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, value: dict[str, jax.Array], shift: jax.Array) -> dict[str, jax.Array]:
        x = nnx.gelu(self.up(self.norm(value["x"]) + shift[:, None]))
        return {**value, "x": value["x"] + self.drop(self.down(x))}


class Center(nnx.Module):
    """No parameters."""

    def __init__(self, rngs: nnx.Rngs):
        pass

    def __call__(self, value: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {**value, "x": value["x"] - value["x"].mean(-1, keepdims=True)}


class Leave(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(WIDTH, WIDTH, rngs=rngs)
        self.linear = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, value: dict[str, jax.Array]) -> jax.Array:
        return self.linear(value["x"] + self.embed(value["largest"]))


LAYERS = [Enter, Mix, Center, Mix, Leave]


def loss(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Weighted squares; the weights are uneven, and those of the first four examples are 0."""
    squares = ((output - batch["target"]) ** 2).mean(-1)
    return (squares * batch["weight"]).sum(), batch["weight"].sum()


def batches(count: int, size: int = 16) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        weight = rng.uniform(0.1, 2.0, size).astype(np.float32)
        weight[:4] = 0
        made.append(
            {
                "inputs": rng.normal(size=(size, WIDTH)).astype(np.float32),
                "shift": rng.normal(size=size).astype(np.float32),
                "target": rng.normal(size=(size, 3)).astype(np.float32),
                "weight": weight,
            }
        )
    return made
