"""What an encoder-decoder moves as a graph and as a chain that carries everything, and how long its steps take.

    python tests/benchmarks/graph.py [--milliseconds 20] [--microbatches 8] [--repeats 5] [--cases 7] [--json FILE]

Both models have eight stages of one layer. Every layer of the decoder reads the memory, which is the last output of the
encoder. As a graph, the memory has a name and goes straight to the ranks that read it. As a chain, every layer of the
decoder takes and returns the memory beside its own output. Bytes are counted from the transfers of the program, over a
whole step. The time of a stage is fixed (`sleeping_layer.py`); efficiency is the share of the step in which ranks work,
measured and as the simulator predicts it for the model's own graph.
"""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from benchmark import median, print_results, times_of
from flax import nnx
from sleeping_layer import WIDTH, SleepingLayer, register

import meshpipe
from meshpipe.choose.memory import stage_memory
from meshpipe.plan.plan import Op
from meshpipe.plan.simulate import Costs, simulate
from meshpipe.plan.traffic import traffic

STAGES = 8
ROWS = 8
"""Of each microbatch."""


@dataclass(frozen=True)
class Case:
    """A layout and a shape of the model."""

    schedule: str
    ranks: int
    encoder: int = STAGES // 2
    """Layers of the encoder, of the eight."""
    source: int = 4
    """Positions of the text that is encoded."""
    target: int = 4


CASES = [
    Case("1f1b", 8),
    Case("zb-h1", 8),
    Case("interleaved-1f1b", 4),
    Case("zb-v", 4),
    Case("interleaved-1f1b", 2),
    Case("interleaved-1f1b", 2, source=32),
    Case("interleaved-1f1b", 2, encoder=2, source=32),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=20.0)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first of them")
    parser.add_argument("--json")
    flags = parser.parse_args()
    meshpipe.use_cpu_devices(STAGES)
    register()
    rows: list[dict[str, object]] = []
    for case in CASES[: flags.cases]:
        graph, carried = (
            Model(case, flags.microbatches, flags.milliseconds / 1e3, carries=carries) for carries in (False, True)
        )
        moved, moved_carried = graph.bytes_moved(), carried.bytes_moved()
        times = [median(times_of(model.run, flags.repeats)) for model in (graph, carried)]
        rows.append(
            {
                "schedule": case.schedule,
                "ranks": case.ranks,
                "encoder+decoder": f"{case.encoder}+{STAGES - case.encoder}",
                "positions": f"{case.source}/{case.target}",
                "kB moved": moved / 1e3,
                "carried": moved_carried / 1e3,
                "share": moved / moved_carried,
                "step, ms": times[0] * 1e3,
                "carried, ms": times[1] * 1e3,
                "predicted": graph.predicted(),
                "measured": graph.work / times[0],
                "measured/predicted": graph.work / times[0] / graph.predicted(),
            }
        )
    print_results("graph: an encoder-decoder with its memory as a named output", rows, flags.json)


class Positions(SleepingLayer):
    """A layer that takes each position of a text by itself."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x.reshape(-1, WIDTH)).reshape(x.shape)


class Reader(Positions):
    """A layer of the decoder. The mean of the memory stands for attention to it: nothing is to cost time here."""

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        return super().__call__(x + memory.mean(axis=1, keepdims=True))


class Carrier(Reader):
    """The same, of a chain: it takes and returns the memory beside its own output."""

    def __call__(self, carried: tuple[jax.Array, jax.Array], targets: jax.Array | None = None) -> Any:
        x, memory = carried
        return super().__call__(x, memory), memory


class FirstCarrier(Reader):
    """The first layer of the decoder, whose input is the batch's."""

    def __call__(self, memory: jax.Array, targets: jax.Array) -> Any:
        return super().__call__(targets, memory), memory


class LastCarrier(Carrier):
    def __call__(self, carried: tuple[jax.Array, jax.Array], targets: jax.Array | None = None) -> Any:
        return super().__call__(carried)[0]


class Model:
    """An encoder-decoder of sleeping stages, as a graph or carried along a chain."""

    def __init__(self, case: Case, num_microbatches: int, seconds: float, *, carries: bool):
        self._seconds = seconds
        self.work = 3 * num_microbatches * STAGES // case.ranks * seconds
        """Seconds that each rank works."""
        self._encoder = case.encoder
        rows = ROWS * num_microbatches
        self._batch: Mapping[str, np.ndarray] = {
            "inputs": np.ones((rows, case.source, WIDTH), np.float32),
            "targets": np.ones((rows, case.target, WIDTH), np.float32),
        }
        self._transformation = optax.sgd(0.0)
        self._trainer = meshpipe.Trainer(
            self._layers(carries=carries),
            lambda output, batch: (output.mean((1, 2)).sum(), output.shape[0]),
            self._transformation,
            batch=self._batch,
            mesh=meshpipe.make_mesh(case.ranks),
            pipeline=meshpipe.PipelineConfig(
                schedule=case.schedule, num_microbatches=num_microbatches, stages_per_rank=STAGES // case.ranks
            ),
        )

    def _layers(self, *, carries: bool) -> list[Any]:
        one = self._seconds
        # Nobody asks for the gradient of the batch, so a layer that reads it has that time in its weights' gradient.
        first, other = (one, one, 2 * one), (one, one, one)
        encoder = [_constructor(Positions, first if i == 0 else other) for i in range(self._encoder)]
        count = STAGES - self._encoder
        if carries:
            kinds = [FirstCarrier, *[Carrier] * (count - 2), LastCarrier]
            return [*encoder, *(_constructor(kind, other) for kind in kinds)]
        decoder = [_constructor(Reader, other) for _ in range(count)]
        return [
            *encoder[:-1],
            meshpipe.named("memory", encoder[-1]),
            meshpipe.reading("targets", decoder[0]),
            *decoder[1:],
        ]

    def bytes_moved(self) -> float:
        """Between ranks in a step, forward and back."""
        model = self._trainer.model
        return sum(moved.total for moved in traffic(model.lowered, stage_memory(model, self._transformation)).values())

    def predicted(self) -> float:
        """The efficiency in simulation."""
        times: dict[Any, float] = dict.fromkeys(Op, self._seconds) | {Op.BACKWARD: 2 * self._seconds}
        at_start = {(0, Op.BACKWARD_INPUT): 0.0, (0, Op.BACKWARD_WEIGHT): 2 * self._seconds}
        return self.work / simulate(self._trainer.plan, Costs(times | at_start)).makespan

    def run(self) -> None:
        jax.block_until_ready(self._trainer.loss_and_gradients(self._batch))


def _constructor(kind: type[SleepingLayer], seconds: tuple[float, float, float]) -> Callable[[nnx.Rngs], SleepingLayer]:
    return lambda rngs: kind(seconds)


if __name__ == "__main__":
    main()
