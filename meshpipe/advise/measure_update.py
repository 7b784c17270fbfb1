"""Measures what an update takes on the devices of this machine."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from meshpipe.choose.layer_run import made_up
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.updates import UpdatePrograms
from meshpipe.sharding import abstract, replicated, scalar_dtype

CALLS = 8
"""Of a program; the fastest counts."""


def update_seconds(transformation: optax.GradientTransformation, stage: StageParameters) -> float:
    """The seconds that the norm of a stage's gradients and the update of its parameters take."""
    programs = UpdatePrograms(transformation, [stage])
    programs.compile()
    shapes = tuple(stage.params.values())
    sums = tuple(abstract(p.shape, jnp.promote_types(p.dtype, jnp.float32), p.sharding) for p in shapes)
    params, gradients, state = made_up(shapes), made_up(sums), made_up(tuple(stage.changing.values()))
    read = made_up(tuple(stage.read_after_step.values()))
    one, applied = jax.device_put((np.ones((), scalar_dtype()), np.True_), replicated(stage.mesh))
    below = ((one,) * (1 + len(programs.sums)),) * 2
    held = [params, programs.inits[0](params)]  # both are donated

    def update() -> Any:
        held[0], held[1], *_ = programs.updates[0](*held, gradients, state, state, one, applied, read)
        return held

    return _fastest(lambda: programs.norms[0](gradients, (one,) * len(stage.sums), below)) + _fastest(update)


def _fastest(call: Callable[[], Any]) -> float:
    taken = []
    for _ in range(1 + CALLS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
