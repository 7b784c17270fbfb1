"""A batch field may have any name: none is the engine's own."""

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh

ROWS = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)


def layer_that_adds(name: str) -> type[nnx.Module]:
    """A layer whose call takes a field of this name, and which draws random numbers, for which a step has a number."""
    made: dict = {}
    exec(f"def call(self, x, {name}): return self.drop(self.linear(x)) + {name}[:, None]", made)

    def init(self: nnx.Module, rngs: nnx.Rngs) -> None:
        self.linear, self.drop = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    return type("Add", (nnx.Module,), {"__init__": init, "__call__": made["call"]})


def loss(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, int]:
    return (output**2).sum(), output.size


def first_loss(name: str) -> float:
    batch = {"inputs": ROWS, name: np.arange(8, dtype=np.float32)}
    pipeline = PipelineConfig(num_microbatches=2)
    trainer = Trainer(
        [layer_that_adds(name)] * 2, loss, optax.sgd(0.1), batch=batch, mesh=make_mesh(2), pipeline=pipeline
    )
    return float(trainer.step(batch).loss)


@pytest.mark.parametrize("name", ["step", "seed", "paths"])
def test_a_field_has_no_name_of_the_engine(name: str) -> None:
    assert first_loss(name) == first_loss("shift")
