"""With compiled programs, the predicted memory of a rank is what its arrays and XLA's temporary memory take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from benchmarks.live_bytes import measure_needs
from flax import nnx
from staged import staged

from meshpipe.choose.memory import predict_memory
from meshpipe.compiled.compile_for import compile_for
from meshpipe.layers.staged_model import StagedModel
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.pipeline.config import PipelineConfig
from meshpipe.sharding import FULLY_SHARDED, ShardingRules
from meshpipe.stage.target import ACCELERATOR

ALLOWED = 0.02
WIDTH, ROWS = 32, 256
TRANSFORMATION = optax.adam(1e-3)


class Block(nnx.Module):
    """A perceptron in bfloat16, whose matrices every axis of a mesh can split."""

    def __init__(self, rngs: nnx.Rngs):
        def init(*axes: str) -> Any:
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)

        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, dtype=jnp.bfloat16, kernel_init=init("embed", "hidden"), rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, dtype=jnp.bfloat16, kernel_init=init("hidden", "embed"), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.gelu(self.up(self.norm(x)))).astype(x.dtype)


def loss(output: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return ((output - batch["target"]) ** 2).sum(), jnp.float32(output.size)


def made(
    *,
    layers: int = 2,
    data: int = 1,
    tensor: int = 1,
    rules: ShardingRules | None = None,
    target: Any = None,
    **pipeline: Any,
) -> tuple[StagedModel, dict[str, np.ndarray]]:
    batch = {name: np.ones((4 * ROWS, WIDTH), np.float32) for name in ("inputs", "target")}
    task = Task([Block] * layers, loss, batch=batch, rules=rules or ShardingRules())
    config = PipelineConfig(**{"num_microbatches": 4, **pipeline})
    return staged(task, make_mesh(2, data, tensor), config, target=target), batch


def slow(**layout: Any) -> Any:
    return pytest.param(layout, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "layout",
    [
        {"schedule": "1f1b", "target": ACCELERATOR},
        slow(schedule="zb-h1", data=2),
        slow(schedule="1f1b"),
        slow(schedule="1f1b", remat="layer"),
        slow(schedule="1f1b", remat="full"),
        slow(schedule="gpipe"),
        slow(schedule="interleaved-1f1b", layers=4),
        slow(schedule="zb-v", remat="full", layers=4),
        slow(schedule="1f1b", tensor=2),
        slow(schedule="1f1b", data=2, rules=FULLY_SHARDED),
        slow(schedule="zb-h1", target=ACCELERATOR),
    ],
    ids=lambda layout: "-".join([str(layout["schedule"]), *list(layout)[1:]]),
)
def test_the_peak_is_that_of_live_arrays_and_temporaries(layout: dict[str, Any]) -> None:
    model, batch = made(**layout)
    measured = measure_needs(model, TRANSFORMATION, batch)
    predicted = predict_memory(model, TRANSFORMATION, programs=compile_for(model, TRANSFORMATION))
    for rank, peak in zip(predicted, measured, strict=True):
        assert (1 - ALLOWED) * peak <= rank.total <= (1 + ALLOWED) * peak
        assert rank.temporaries > 0.1 * peak  # not small: without them, the prediction would be far off
        assert rank.peak_in


@pytest.mark.slow
def test_a_peak_in_the_update_counts() -> None:
    """An optimizer that needs more inside itself than all activations of a step with tiny microbatches."""
    batch = {name: np.ones((4, WIDTH), np.float32) for name in ("inputs", "target")}
    config = PipelineConfig(num_microbatches=4, schedule="1f1b")
    model = staged(Task([Block] * 4, loss, batch=batch), make_mesh(2), config)

    def update(gradients: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(lambda g: jnp.sort(jnp.tile(g[None], (16,) + (1,) * g.ndim), 0)[3] * 1e-3, gradients), state

    greedy = optax.GradientTransformation(lambda params: (), update)
    measured = measure_needs(model, greedy, batch)
    predicted = predict_memory(model, greedy, programs=compile_for(model, greedy))
    for rank, peak in zip(predicted, measured, strict=True):
        assert (1 - ALLOWED) * peak <= rank.total <= (1 + ALLOWED) * peak
        assert rank.peak_in.startswith("update of stage")
