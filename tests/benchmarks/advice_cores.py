"""How well the order of layouts by estimate agrees with their order by measurement, where virtual devices compute.

    python tests/benchmarks/advice_cores.py [--devices 4] [--each 4] [--rounds 10] [--seed 0] [--model medium]
                                            [--json FILE]

A language model, 16 sequences of 64 bytes, AdamW, on virtual devices that share the cores of this machine: `medium` has
5 million parameters, `small` 0.9 million, `wide` 9 million. The layouts are `--each` of every mesh and sharding, drawn
by chance from all that `meshpipe advise` considers. They are estimated as `meshpipe advise --target here` does it, with
layers that are measured; and, for comparison, by the rates of the machine. All layouts are compiled first, then take
turns, so that noise of the machine meets all of them.

Kendall's tau is 1 where both orders agree. How well the measurement knows its own order is shown by the tau between
the fastest steps of its even and of its odd rounds: no estimate can agree much better with it. Pairs that these halves
order alike are those that it can tell apart. Processor time is disturbed less by what else runs, and knows nothing of
waiting.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import jax
import numpy as np
from advice import kendall, regret
from benchmark import print_results

import meshpipe
from meshpipe.advise.candidates import Space
from meshpipe.advise.estimate import Estimator
from meshpipe.advise.here import measured_machine, target_here, with_measured_layers
from meshpipe.advise.layout import Layout
from meshpipe.advise.survey import survey
from meshpipe.advise.times import Roofline
from meshpipe.config import Config
from meshpipe.data import TextFilesConfig
from meshpipe.host import keep_freed_memory
from meshpipe.models import LanguageModelConfig
from meshpipe.runs.build import make_trainer

BATCH = 16
MODELS = {
    "small": LanguageModelConfig(d_model=128, num_blocks=4, num_heads=4, num_kv_heads=4, d_hidden=384),
    "medium": LanguageModelConfig(d_model=256, num_blocks=6, num_heads=4, num_kv_heads=4, d_hidden=768),
    "wide": LanguageModelConfig(d_model=512, num_blocks=3, num_heads=8, num_kv_heads=4, d_hidden=1408),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--each", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of layouts")
    parser.add_argument("--model", choices=MODELS, default="medium")
    parser.add_argument("--json")
    flags = parser.parse_args()
    meshpipe.use_cpu_devices(flags.devices)
    keep_freed_memory()  # as the command does
    config = Config(model=MODELS[flags.model], data=TextFilesConfig(sequence_length=64), batch_size=BATCH)
    devices = jax.devices()
    space = Space(num_devices=flags.devices, batch_size=BATCH, num_layers=len(config.layers()))
    machine = measured_machine(target_here(devices).hardware, devices)
    work = survey(config, devices)
    by_rates = Estimator(work, Roofline(work, machine), machine, BATCH)
    began = time.perf_counter()
    estimator = with_measured_layers(by_rates, config, devices, space)
    print(f"layers measured in {time.perf_counter() - began:.0f} s")
    layouts = [layout for layout in drawn(space, flags.each, flags.seed) if estimator.why_not(layout) is None]
    estimates = [estimator.estimate(layout) for layout in layouts]
    rates = {estimate.layout: by_rates.estimate(estimate.layout).seconds for estimate in estimates}
    wall, processor = measure(config, [estimate.layout for estimate in estimates], flags.rounds)
    rows: list[dict[str, object]] = [
        {
            "layout": f"{e.layout.mesh}, {e.layout.sharding}, {e.layout.order}",
            "microbatches": e.layout.num_microbatches,
            "remat": e.layout.remat,
            "by rates, s": rates[e.layout],
            "estimated, s": e.seconds,
            "measured, s": min(seconds),
            "measured/estimated": min(seconds) / e.seconds,
            "processor, s": min(of_processor),
        }
        for e, seconds, of_processor in sorted(zip(estimates, wall, processor, strict=True), key=lambda r: r[0].seconds)
    ]
    print_results("advice: layouts of virtual devices by their estimates", rows, flags.json)
    for what, times in (("step", wall), ("processor", processor)):
        print(f"{what} time: {agreement([e.seconds for e in estimates], times)}")
    print(f"step time, by rates: {agreement([rates[e.layout] for e in estimates], wall)}")


def drawn(space: Space, each: int, seed: int) -> list[Layout]:
    """So many layouts of every mesh and sharding, the same whenever the seed is."""
    by_mesh = defaultdict(list)
    for layout in space.layouts():
        by_mesh[layout.mesh, layout.sharding].append(layout)
    chance = random.Random(seed)
    return [layout for layouts in by_mesh.values() for layout in chance.sample(layouts, min(each, len(layouts)))]


def measure(config: Config, layouts: Sequence[Layout], rounds: int) -> tuple[list[list[float]], list[list[float]]]:
    """The seconds of the steps of each layout, by the clock and of all processors."""
    batch = config.task().batch
    trainers = [make_trainer(layout.configure(config)) for layout in layouts]
    wall: list[list[float]] = [[] for _ in layouts]
    processor: list[list[float]] = [[] for _ in layouts]
    for turn in range(-1, rounds):
        for trainer, seconds, of_processor in zip(trainers, wall, processor, strict=True):
            began = time.perf_counter(), time.process_time()
            jax.block_until_ready((trainer.step(batch).loss, trainer.params))
            if turn >= 0:
                seconds.append(time.perf_counter() - began[0])
                of_processor.append(time.process_time() - began[1])
    return wall, processor


def agreement(estimated: Sequence[float], times: Sequence[Sequence[float]]) -> str:
    even, odd = ([min(seconds[first::2]) for seconds in times] for first in (0, 1))
    fastest = list(map(min, times))
    known = [(i, j) for i, j in combinations(range(len(times)), 2) if (even[i] < even[j]) == (odd[i] < odd[j])]
    alike = np.mean([np.sign(estimated[i] - estimated[j]) * np.sign(fastest[i] - fastest[j]) for i, j in known])
    return (
        f"{len(times)} layouts, Kendall's tau {kendall(estimated, fastest):.3f}, of the measurement with itself "
        f"{kendall(even, odd):.3f}, of the {len(known)} pairs that it can tell apart {alike:.3f}, regret "
        f"{regret(estimated, fastest):.2%}"
    )


if __name__ == "__main__":
    main()
