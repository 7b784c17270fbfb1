"""What only an evaluation would run is traced at set-up, so that its errors come before training."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh

ROWS = {"inputs": np.ones((4, 2), np.float32)}


class Linear(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


class Averaging(Linear):
    """Fails in evaluation mode alone."""

    def __call__(self, x: jax.Array, *, train: bool = True) -> jax.Array:
        return self.linear(x) if train else self.linear(x.reshape(-1, 3))


def squares(output: Any, batch: Any) -> Any:
    return (output**2).sum(), output.size


def make(layers: list[Any], metrics: Any) -> Trainer:
    return Trainer(
        layers,
        squares,
        optax.sgd(0.1),
        batch=ROWS,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
        metrics=metrics,
    )


def test_metrics_that_fail_do_so_before_training() -> None:
    def metrics(output: Any, batch: Any) -> Any:
        return {"accuracy": ((output == batch["labels"]).sum(), output.shape[0])}

    with pytest.raises(KeyError, match="labels") as caught:
        make([Linear, Linear], metrics)
    note = caught.value.__notes__[0]
    assert note.startswith("This comes from the metrics, called with the output of the last layer, float32[2, 2]")


def test_metrics_without_weights_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="Metrics must return a dict with a pair of scalars by name"):
        make([Linear, Linear], lambda output, batch: {"mean": output.mean()})


def test_a_layer_that_fails_in_evaluation_alone_does_so_before_training() -> None:
    def metrics(output: Any, batch: Any) -> Any:
        return {"largest": (output.max(), 1)}

    with pytest.raises(TypeError, match="reshape") as caught:
        make([Averaging, Linear], metrics)
    assert "layers/0 (Averaging, stage 0)" in caught.value.__notes__[0]
    assert "in evaluation" in caught.value.__notes__[0]
    assert set(make([Linear, Linear], metrics).evaluate([ROWS])) == {"loss", "largest"}
