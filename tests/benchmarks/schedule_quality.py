"""How close a step comes to what the simulator predicts, with stages that take a fixed time and no core.

    python tests/benchmarks/schedule_quality.py [--ranks 4] [--milliseconds 20] [--schedules 1f1b zb-h1] [--json FILE]

Efficiency is the share of the step in which ranks work. Every stage takes the given time for each of forward, input
gradient and weight gradient.
"""

import argparse
from collections.abc import Callable

import jax
import numpy as np
import optax
from benchmark import median, print_results, times_of
from flax import nnx
from sleeping_layer import WIDTH, SleepingLayer, register

import meshpipe
from meshpipe.observe.clock import MeasuredStep
from meshpipe.plan.plan import Op, Plan
from meshpipe.plan.schedules import SCHEDULES, STAGES_PER_RANK
from meshpipe.plan.simulate import Costs, Timeline, simulate

ROWS = 8
"""Of each microbatch."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--milliseconds", type=float, default=20.0)
    parser.add_argument("--schedules", nargs="+", default=[name for name in SCHEDULES if name != "inference"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    flags = parser.parse_args()
    meshpipe.use_cpu_devices(flags.ranks)
    register()
    rows: list[dict[str, object]] = []
    for name in flags.schedules:
        for count in flags.microbatches:
            step = SleepingStep(name, flags.ranks, count, flags.milliseconds / 1e3)
            predicted, measured = step.predicted(), median(times_of(step.run, flags.repeats))
            textbook = count / (count + flags.ranks - 1)
            rows.append(
                {
                    "schedule": name,
                    "ranks": flags.ranks,
                    "microbatches": count,
                    "textbook M/(M+R-1)": textbook,
                    "predicted": step.work / predicted.makespan,
                    "measured": step.work / measured,
                    "measured/predicted": predicted.makespan / measured,
                    "us per action": measured / len(step.plan.actions) * 1e6,
                }
            )
    print_results("schedule quality: efficiency", rows, flags.json)


class SleepingStep:
    """The engine, without an optimizer, on stages that sleep."""

    def __init__(self, schedule: str, num_ranks: int, num_microbatches: int, seconds: float):
        least, _ = STAGES_PER_RANK[schedule]
        self._seconds = seconds
        self.work = 3 * num_microbatches * least * seconds
        """Seconds that each rank works."""
        batch = {"inputs": np.ones((ROWS * num_microbatches, WIDTH), np.float32)}
        trainer = meshpipe.Trainer(
            [_constructor(seconds, is_first=i == 0) for i in range(num_ranks * least)],
            lambda output, batch: (output.sum(), output.size),
            optax.sgd(0.0),
            batch=batch,
            mesh=meshpipe.make_mesh(num_ranks),
            pipeline=meshpipe.PipelineConfig(schedule=schedule, num_microbatches=num_microbatches),
        )
        self.plan: Plan = trainer.plan
        self._trainer, self._batch = trainer, batch

    def predicted(self) -> Timeline:
        once, twice = self._seconds, 2 * self._seconds
        times = dict.fromkeys(Op, once) | {Op.BACKWARD: twice}
        return simulate(self.plan, Costs({**times, (0, Op.BACKWARD_INPUT): 0.0, (0, Op.BACKWARD_WEIGHT): twice}))

    def run(self) -> None:
        jax.block_until_ready(self._trainer.loss_and_gradients(self._batch))

    def measure(self) -> MeasuredStep:
        measured = self._trainer.step(self._batch, measure=True).measured
        assert measured is not None
        return measured


def _constructor(seconds: float, *, is_first: bool) -> Callable[[nnx.Rngs], SleepingLayer]:
    # Nobody asks for the gradient of the batch, so the first layer has that time in the gradient of its weights.
    return lambda rngs: SleepingLayer((seconds, seconds, 2 * seconds if is_first else seconds))


if __name__ == "__main__":
    main()
