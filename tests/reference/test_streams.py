"""Verify compares layers that draw random numbers from the `rngs` of their call, and weights that a rule splits over
several mesh axes.
"""

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh

from meshpipe import PipelineConfig, ShardingRules, verify

WIDTH, ROWS = 8, 8
RNG = np.random.default_rng(0)
BATCHES = [{"inputs": RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)} for _ in range(2)]


class Noisy(nnx.Module):
    """Gets its random streams by its call."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        x = self.linear(x)
        return x + jax.random.normal(rngs.noise(), x.shape) * jax.random.normal(rngs.noise(), x.shape)


def loss(output, batch):
    return (output**2).sum(), output.size


def mesh(*sizes: int, names: tuple[str, ...]) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(sizes))]).reshape(sizes)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def check(layers, **options):
    pipeline = PipelineConfig(num_microbatches=2)
    report = verify(layers, loss, optax.adam(1e-2), batches=BATCHES, pipeline=pipeline, **options)
    assert report.ok, report.first


@pytest.mark.slow
def test_streams_that_a_call_is_given_are_the_same_on_both_sides() -> None:
    check([Noisy] * 3, mesh=mesh(2, 2, names=("pipeline", "data")))


def test_a_rule_over_two_mesh_axes_trains_as_one_device() -> None:
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "hidden"))
    layers = [lambda rngs: nnx.Linear(WIDTH, WIDTH, kernel_init=init, rngs=rngs)] * 2
    rules = ShardingRules(rules={"hidden": ("expert", "tensor")})
    check(layers, mesh=mesh(2, 1, 2, 2, names=("pipeline", "data", "expert", "tensor")), rules=rules)
