"""A step that does not end is reported with what every rank waits for."""

import threading
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from waiting import LONG

import meshpipe
from meshpipe.observe.clock import MAX_WAITING, StepClock
from meshpipe.observe.watchdog import Watchdog
from meshpipe.plan.lower import Transfer, lower
from meshpipe.plan.schedules import make_plan


class Result:
    """Stands for an array that is there, or not yet."""

    nbytes = 4

    def __init__(self, ready: bool) -> None:
        self._ready = ready

    def is_ready(self) -> bool:
        return self._ready


def observed(watchdog: Watchdog, arrived: int) -> None:
    """Hands over a whole step, of which the first results are there."""
    plan = make_plan("1f1b", 2, 2)
    watchdog.begin_step()
    instructions = [i for i in lower(plan).instructions if hasattr(i, "action") or isinstance(i, Transfer)]
    for number, instruction in enumerate(instructions):
        watchdog._seen.append((instruction, Result(number < arrived)))  # type: ignore[arg-type]


def test_the_first_action_that_is_not_there_is_named() -> None:
    watchdog = Watchdog(make_plan("1f1b", 2, 2), 1.0, print)
    observed(watchdog, 3)  # 0F0, its move, 0F1
    assert watchdog.waiting() == [
        "rank 0 waits in 0B0 (backward of stage 0, microbatch 0), for dy0.0 from rank 1",
        "rank 1 waits in 1F0 (forward of stage 1, microbatch 0)",
    ]
    observed(watchdog, 100)
    assert watchdog.waiting() == ["rank 0 has done what it was given", "rank 1 has done what it was given"]


def test_silence_fails_the_run_and_steps_keep_it_alive() -> None:
    failed = threading.Event()
    messages: list[str] = []

    def fail(message: str) -> None:
        messages.append(message)
        failed.set()

    with Watchdog(make_plan("1f1b", 2, 2), 0.3, fail) as watchdog:
        assert not failed.wait(0.8), "the first step has no limit"
        observed(watchdog, 3)
        watchdog.end_step()
        assert failed.wait(LONG)
    assert messages[0].startswith("no step has ended for 0.3 s: rank 0 waits in 0B0")


ROWS = WIDTH = 64


def test_watching_holds_no_activations() -> None:
    """Nor does timing, but for a few of each rank."""
    count = 24
    batch = {"inputs": np.ones((ROWS * count, WIDTH), np.float32)}
    trainer = meshpipe.Trainer(
        [lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)] * 4,
        lambda output, fields: ((output**2).sum(), output.size),
        optax.sgd(1e-3),
        batch=batch,
        mesh=meshpipe.make_mesh(pipeline=2),
        pipeline=meshpipe.PipelineConfig(num_microbatches=count),
    )

    def held(observe: Any) -> int:
        trainer.check(trainer.step(batch, observe=observe))
        return sum(array.nbytes for array in jax.live_arrays())

    activation = ROWS * WIDTH * 4
    alone = held(None)
    watchdog = Watchdog(trainer.plan, 60.0, print)
    assert held(watchdog.observe) - alone < activation
    assert len(watchdog._seen) > 4 * count
    assert watchdog.waiting() == [f"rank {rank} has done what it was given" for rank in (0, 1)]

    clock = StepClock(trainer.plan, trainer.model.executor.accumulators())
    waiting = 0

    def observe(*arguments: Any) -> None:
        nonlocal waiting
        clock.observe(*arguments)
        waiting = max(waiting, *(lane._thread._work_queue.qsize() for lane in clock._lanes.values()))

    trainer.step(batch, observe=observe)
    assert set(clock.finish().timeline.ends) == trainer.plan.actions
    assert waiting <= MAX_WAITING
