"""How well the order of layouts by estimate agrees with their order by measurement, and what the advice costs.

    python tests/benchmarks/advice.py [--milliseconds 1] [--repeats 5] [--json FILE]

The stages of 40 layouts sleep for as long as their layers were measured to take, so two cores show the steps that many
devices would have. Kendall's tau is 1 where both orders agree, and 0 where they have nothing to do with each other. The
regret is how much longer than the fastest layout the one with the shortest estimate takes.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import jax
import numpy as np
from benchmark import print_results, times_of
from sleeping_layer import WIDTH, SleepingLayer, register

import meshpipe
from meshpipe.advise.candidates import Space
from meshpipe.advise.cases import Case, Cases
from meshpipe.advise.estimate import Estimator
from meshpipe.advise.layout import Layout
from meshpipe.advise.measure_layers import measure_layers
from meshpipe.advise.survey import survey
from meshpipe.config import Config
from meshpipe.data import DataConfig
from meshpipe.hardware.hardware import Hardware
from meshpipe.models.model import LayerConstructor, ModelConfig, SumAndWeight
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.runs.build import make_trainer

ROWS = 16
"""Examples of a batch."""
MICROBATCHES = (4, 8, 16)
LAYERS = Cases([Case(1, examples, together=1) for examples in (1, 4)], splits=True)
"""How layers are measured."""
LINK = 1e10
MACHINE = Hardware(
    name="cores",
    platform="cpu",
    device_kind="cpu",
    flops={"float32": 1e10},
    memory_bytes=2**34,
    memory_bandwidth=1e10,
    host_link=LINK,
    network_link=LINK,
    host_latency=2e-4,
    network_latency=2e-4,
    devices_per_host=64,
    joined_devices=64,
    efficiency={"products": 1.0, "memory": 1.0, "links": 1.0, "network": 1.0},
)
"""Only its links count: layers are measured."""


@dataclass(frozen=True, kw_only=True)
class SleepingConfig(ModelConfig):
    """Layers of uneven length, each of which sleeps for every row of its microbatch."""

    input = "inputs"
    seconds: float = 1e-3
    """Of a row, in forward, input gradient and weight gradient each, of a layer of middle length."""
    lengths: tuple[float, ...] = (0.8, 1.0, 1.2, 1.0, 1.0, 0.8, 1.0, 1.4)

    def layers(self) -> list[LayerConstructor]:
        return [self._layer(length * self.seconds, is_first=i == 0) for i, length in enumerate(self.lengths)]

    def _layer(self, seconds: float, *, is_first: bool) -> LayerConstructor:
        of_weights = 2 * seconds if is_first else seconds  # nobody asks for the gradient of the batch
        return lambda rngs: SleepingLayer((seconds, seconds, of_weights), of_each_row=True)

    def loss(self, output: jax.Array, batch: Mapping[str, jax.Array]) -> SumAndWeight:
        return (output**2).sum(), jax.numpy.float32(output.size)


@dataclass(frozen=True, kw_only=True)
class OnesConfig(DataConfig):
    def train_source(self) -> Sequence[Mapping[str, Any]]:
        return [{"inputs": np.ones(WIDTH, np.float32)}] * ROWS

    def eval_source(self) -> Sequence[Mapping[str, Any]]:
        return self.train_source()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    flags = parser.parse_args()
    meshpipe.use_cpu_devices(4)
    register()
    compared = compare(flags.milliseconds / 1e3, flags.repeats, list(layouts()))
    rows: list[dict[str, object]] = [
        {
            "layout": f"{layout.mesh}, {layout.order}, {layout.num_microbatches} microbatches",
            "estimated, s": estimated,
            "measured, s": measured,
            "measured/estimated": measured / estimated,
        }
        for layout, estimated, measured, _ in sorted(compared, key=lambda row: row[1])
    ]
    print_results("advice: layouts by their estimates", rows, flags.json)
    estimated, fastest, median = (list(column) for column in list(zip(*compared, strict=True))[1:])
    for what, measured in (("fastest", fastest), ("median", median)):
        print(
            f"{len(compared)} layouts by their {what} step: Kendall's tau {kendall(estimated, measured):.3f}, "
            f"regret {regret(estimated, measured):.2%}"
        )


def layouts() -> Iterator[Layout]:
    """Layouts of two and four ranks."""
    for pipeline in (4, 2):
        for layout in Space(num_devices=pipeline, batch_size=ROWS, num_layers=8, fixed={"remat": "none"}).layouts():
            is_meant = layout.pipeline == pipeline and layout.num_microbatches in MICROBATCHES
            if is_meant and layout.stages_per_rank < 4 and (pipeline == 4 or layout.num_microbatches == 8):
                yield layout


def compare(seconds: float, repeats: int, chosen: Sequence[Layout]) -> list[tuple[Layout, float, float, float]]:
    """The estimated seconds of each layout's step, and those of the fastest step and of the median one."""
    config = Config(
        model=SleepingConfig(seconds=seconds),
        data=OnesConfig(),
        optimizer=OptimizerConfig(learning_rate=0.0, optimizer="sgd"),
        batch_size=ROWS,
    )
    # On one device: XLA does not split the custom call that sleeps, so several would each sleep for the rows of all.
    times = measure_layers(config, jax.devices()[:1], LAYERS)
    estimator = Estimator(survey(config, jax.devices()), times, MACHINE, ROWS)
    batch = {"inputs": np.ones((ROWS, WIDTH), np.float32)}
    found = []
    for layout in chosen:
        estimate = estimator.estimate(layout)
        trainer = make_trainer(estimate.layout.configure(config))

        def run() -> None:
            jax.block_until_ready(trainer.step(batch).loss)  # noqa: B023

        # Sleep is exact, and the noise of a busy machine only ever adds to it.
        taken = times_of(run, repeats)
        found.append((layout, estimate.seconds, min(taken), statistics.median(taken)))
    return found


def kendall(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau of two orders. Estimates that are equal, as those of schedules that are, agree with any order."""
    pairs = [
        np.sign(a - b) * np.sign(c - d)
        for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)
        if abs(a - b) > 1e-9 * max(a, b)
    ]
    return float(np.mean(pairs))


def regret(estimated: Sequence[float], measured: Sequence[float]) -> float:
    """How much longer the layout with the shortest estimate takes than the fastest."""
    return measured[int(np.argmin(estimated))] / min(measured) - 1


if __name__ == "__main__":
    main()
