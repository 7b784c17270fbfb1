"""The times of layers as they were measured on the devices of this machine."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np

from meshpipe.advise.layout import Layout
from meshpipe.advise.times import RECOMPUTING, Seconds
from meshpipe.advise.work import Amount
from meshpipe.choose.chooser import Chooser
from meshpipe.config import Config
from meshpipe.mesh import make_mesh
from meshpipe.plan.layer_costs import LayerCosts
from meshpipe.plan.plan import Op

CALLS = 50
"""Of the program that does nothing."""


@dataclass(frozen=True)
class Measured:
    """The measured times of every layer on one device, as lines through two sizes of microbatches.

    A tensor axis is taken to divide them: what it all-reduces is not measured.
    """

    layers: tuple[Mapping[Op, Amount], ...]

    def seconds(self, place: int, op: Op, examples: float, layout: Layout) -> Seconds:
        """As `LayerTimes` has it."""
        times = self.layers[place]
        own = Seconds(times[op].of(examples) / layout.tensor)
        if layout.remat not in RECOMPUTING or op not in (Op.BACKWARD, Op.BACKWARD_INPUT):
            return own
        return own + Seconds(recompute=times[Op.FORWARD].of(examples) / layout.tensor)


def measure_layers(config: Config, sizes: tuple[int, int]) -> Measured:
    """Measures every kind of layer of a run on the first device, with microbatches of two sizes.

    Raises `ValueError` when a size does not divide the batch.
    """
    small, large = (_costs(config, size) for size in sizes)
    waiting = _seconds_to_wait()
    return Measured(
        tuple(
            {op: _line(sizes, first.time(op) - waiting, second.time(op) - waiting) for op in Op}
            for first, second in zip(small, large, strict=True)
        )
    )


def _costs(config: Config, size: int) -> tuple[LayerCosts, ...]:
    alone = Layout(num_microbatches=config.batch_size // size).configure(config)
    mesh = make_mesh(devices=jax.devices()[:1])
    return Chooser(alone.task(), alone.optimizer.build(alone.steps), mesh=mesh, config=alone.pipeline).measure().layers


def _seconds_to_wait() -> float:
    """How long a program takes that does nothing, until its result is known to be there. A step waits for none of its
    programs, and starts them while others run.
    """
    nothing = jax.jit(lambda x: x).lower(jax.ShapeDtypeStruct((), np.float32)).compile()
    value, taken = np.float32(0), []
    for _ in range(CALLS):
        began = time.perf_counter()
        jax.block_until_ready(nothing(value))
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _line(sizes: tuple[int, int], small: float, large: float) -> Amount:
    """The amount through two measurements; neither part of it is below 0, whatever their noise."""
    each = max(0.0, (large - small) / (sizes[1] - sizes[0]))
    return Amount(max(0.0, small - each * sizes[0]), each)
