"""Recipes of a model that compiles within seconds, to try the commands on; a user's own model, data and layouts."""

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from meshpipe.config import Config
from meshpipe.data import DataConfig
from meshpipe.mesh import MeshConfig
from meshpipe.models.model import LayerConstructor, ModelConfig, SumAndWeight
from meshpipe.pipeline.config import PipelineConfig


class Dense(nnx.Module):
    def __init__(self, size_in: int, size_out: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(size_in, size_out, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.linear(x))


@dataclass(frozen=True, kw_only=True)
class DenseConfig(ModelConfig):
    input = "inputs"
    width: int = 8
    """Units of a layer."""
    depth: int = 4
    """Layers."""

    def layers(self) -> list[LayerConstructor]:
        return [lambda rngs: Dense(self.width, self.width, rngs=rngs)] * self.depth

    def loss(self, output: jax.Array, batch: Mapping[str, jax.Array]) -> SumAndWeight:
        losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"])
        return losses.sum(), jnp.float32(losses.size)


class LongName(nnx.Module):
    """A layer whose leaf has a path that no file can have as its name."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        setattr(self, "inner" * 50, nnx.Linear(width, width, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        return getattr(self, "inner" * 50)(x)


@dataclass(frozen=True, kw_only=True)
class LongNameConfig(DenseConfig):
    def layers(self) -> list[LayerConstructor]:
        return [lambda rngs: LongName(self.width, rngs=rngs)] * self.depth


READ = itertools.count(1)
"""Points that were read in this process."""


@dataclass(frozen=True)
class Points:
    """Points whose class is their largest coordinate; one of them can be poisoned."""

    count: int
    width: int
    poisoned: int | None = None
    seconds: float = 0.0
    gate: str | None = None
    open_for: int = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if index > 0:  # the first is read to see its shape
            time.sleep(self.seconds)
        if self.gate and next(READ) > self.open_for:
            while not Path(self.gate).exists():
                time.sleep(0.01)
        point = np.random.default_rng(index).normal(size=self.width).astype(np.float32)
        label = np.argmax(point).astype(np.int32)
        return {"inputs": point * np.float32(np.nan) if index == self.poisoned else point, "labels": label}


@dataclass(frozen=True, kw_only=True)
class PointsConfig(DataConfig):
    count: int = 512
    """Points to learn from."""
    width: int = 8
    """Coordinates of a point."""
    poisoned: int | None = None
    """A point that is not a number."""
    seconds: float = 0.0
    """Time that it takes to read a point to learn from."""
    gate: str | None = None
    """A file that has to be there before more than `open_for` points to learn from are read."""
    open_for: int = 100
    """Points that can be read without that file."""

    def train_source(self) -> Points:
        return Points(self.count, self.width, self.poisoned, self.seconds, self.gate, self.open_for)

    def eval_source(self) -> Points:
        return Points(64, self.width)


def single() -> Config:
    """One device."""
    return Config(model=DenseConfig(), data=PointsConfig(), batch_size=16, steps=6)


def pipeline() -> Config:
    """Two ranks."""
    return replace(single(), mesh=MeshConfig(pipeline=2), pipeline=PipelineConfig(num_microbatches=4))


def long_names() -> Config:
    """One device, and paths too long to be saved."""
    return replace(single(), model=LongNameConfig(depth=1))
