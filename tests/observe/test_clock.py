"""The times of a real step: every action and transfer once, in an order that could be, and the numbers of any step."""

import statistics
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from waiting import wait_until

import meshpipe
from meshpipe.plan.lower import Compute, Transfer, lower
from meshpipe.plan.plan import Op
from meshpipe.stage.target import CPU, Target

WIDTH = 8


def trainer(schedule: str, remat: str = "none", target: Target = CPU) -> meshpipe.Trainer:
    stages = 4 if schedule == "zb-v" else 2
    return meshpipe.Trainer(
        [lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)] * stages,
        lambda output, batch: (((output - batch["targets"]) ** 2).sum(), output.shape[0]),
        optax.sgd(0.1),
        batch=batch(),
        mesh=meshpipe.make_mesh(pipeline=2),
        pipeline=meshpipe.PipelineConfig(schedule=schedule, num_microbatches=4, remat=remat),
        target=target,
    )


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(8, WIDTH)).astype(np.float32) for name in ("inputs", "targets")}


@pytest.fixture(
    scope="module",
    params=[("1f1b", "full", False), ("zb-v", "none", False), ("1f1b", "none", True)],
    ids=["1f1b", "zb-v", "1f1b with one program for both"],
)
def pair(request: pytest.FixtureRequest) -> tuple[meshpipe.Trainer, meshpipe.Trainer]:
    schedule, remat, fused = request.param
    target = replace(CPU, fuses_last_stage=fused)
    return trainer(schedule, remat, target), trainer(schedule, remat, target)


def test_every_action_and_transfer_has_its_time(pair: tuple[meshpipe.Trainer, meshpipe.Trainer]) -> None:
    timed, plain = pair
    results = [timed.step(batch(), measure=True) for _ in range(2)]
    for result in results:
        untimed = plain.step(batch())
        assert untimed.measured is None
        assert float(result.loss) == float(untimed.loss), "timing changes nothing"
    measured = results[-1].measured
    assert measured is not None
    timeline, plan = measured.timeline, timed.plan
    assert set(timeline.starts) == set(timeline.ends) == plan.actions
    transfers = [i for i in lower(plan).instructions if isinstance(i, Transfer)]
    assert set(measured.transfers) == set(transfers)
    arrivals = {transfer.target: end for transfer, (_, end) in measured.transfers.items()}
    for order in plan.orders:
        free_at = 0.0
        for action in order:
            assert free_at <= timeline.starts[action] <= timeline.ends[action]
            free_at = timeline.ends[action]
    for instruction in lower(plan).instructions:
        if isinstance(instruction, Compute):
            for buffer in instruction.reads:
                assert arrivals.get(buffer, 0.0) <= timeline.starts[instruction.action]
    if timed.model.programs[plan.num_stages - 1].forward_backward is not None:
        last = plan.orders[-1]
        assert sum(timeline.ends[a] - timeline.starts[a] for a in last if a.op is Op.FORWARD) > 0
        assert all(timeline.ends[a] == timeline.starts[a] for a in last if a.op is Op.BACKWARD)
    assert 0 < timeline.bubble_fraction < 1
    assert sum(timeline.busy) > 0


def test_a_slow_action_is_seen_to_be_slow() -> None:
    size = 1000
    wide = partial(_wide, size)
    slow = meshpipe.Trainer(
        [lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), wide],
        lambda output, batch: ((output**2).sum(), output.shape[0]),
        optax.sgd(0.0),
        batch=batch(),
        mesh=meshpipe.make_mesh(pipeline=2),
        pipeline=meshpipe.PipelineConfig(num_microbatches=2),
    )
    slow.step(batch())
    busy = []

    def is_seen() -> bool:
        measured = slow.step(batch(), measure=True).measured
        assert measured is not None
        busy.append(measured.timeline.busy)
        # Medians, since a thread that waits for a core makes a single action look long; more steps where many do.
        quick, long = (statistics.median(times) for times in zip(*busy, strict=True))
        return len(busy) >= 3 and long > 5 * quick

    wait_until(is_seen, lambda: busy)


def _wide(size: int, rngs: nnx.Rngs) -> "Wide":
    return Wide(size, rngs)


class Wide(nnx.Module):
    """Products of large matrices, which no other layer here has."""

    def __init__(self, size: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (size, size)) / size)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        return x * (kernel @ kernel @ kernel).sum()
