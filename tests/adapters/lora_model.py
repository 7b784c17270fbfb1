"""A model of every module that an adapter fits, and a batch for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH, HEADS, TOKENS, CLASSES = 8, 2, 16, 4
RANK, ALPHA = 2, 6.0
SPLIT = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "hidden"))
JOIN = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("hidden", "embed"))


class Block(nnx.Module):
    """A module in a list, one of several output dims, one of several input dims, and an einsum over shared heads."""

    def __init__(self, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        args: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype}
        self.norm = nnx.LayerNorm(WIDTH, **args)
        self.parts = nnx.List(
            [
                nnx.Linear(WIDTH, 2 * WIDTH, kernel_init=SPLIT, **args),
                nnx.Linear(2 * WIDTH, WIDTH, kernel_init=JOIN, **args),
            ]
        )
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, WIDTH), **args)
        self.mix = nnx.Einsum("...hd,hde->...he", (HEADS, WIDTH, WIDTH), (HEADS, WIDTH), **args)
        self.out = nnx.LinearGeneral((HEADS, WIDTH), WIDTH, axis=(-2, -1), **args)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.parts[1](nnx.gelu(self.parts[0](self.norm(x))))
        return x + self.out(jnp.tanh(self.mix(self.query(x))))


def embed(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Embed(TOKENS, WIDTH, rngs=rngs)


def head(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(WIDTH, CLASSES, rngs=rngs)


LAYERS = [embed, Block, jnp.tanh, Block, head]
ADAPTED = ("*", "!layers/4")
"""All modules of these layers that an adapter fits, but for the last."""


def loss(output: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return ((output - batch["target"]) ** 2).mean(-1).sum(), jnp.float32(len(output))


def batches(count: int, size: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        {
            "inputs": rng.integers(0, TOKENS, size).astype(np.int32),
            "target": rng.normal(size=(size, CLASSES)).astype(np.float32),
        }
        for _ in range(count)
    ]


def ready(make: Any, seed: int = 1, **options: Any) -> Any:
    """The module of a constructor; a function stays as it is."""
    with nnx.use_eager_sharding(False):
        return make if make is jnp.tanh else make(rngs=nnx.Rngs(seed), **options)


def with_values(modules: Any, seed: int = 0) -> Any:
    """The modules with adapters that change something: B is drawn."""
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    state = nnx.state(nnx.List(modules), nnx.LoRAParam, graph=True)
    for path, variable in nnx.to_flat_state(state):
        if path[-1] == "lora_b":
            variable[...] = 0.1 * jax.random.normal(next(keys), variable.shape, variable.dtype)
    return modules


def chain(modules: Any, x: jax.Array) -> jax.Array:
    for module in modules:
        x = module(x)
    return x
