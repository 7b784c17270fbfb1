"""A step in two processes of one thread each, against the same step in one process with two devices and two threads.

    python tests/benchmarks/processes.py [--rounds 9] [--schedules 1f1b zb-h2] [--json FILE]

The first table has the transformer of `real_compute.py` in two stages, the second stages so small that only the host's
work is left. A step is timed here, from the word to begin until every process has its parameters; `two/one` is what
the second process costs, the median over the rounds. `dispatch` is how long a call of `Trainer.step` takes, without
waiting for what it hands out; it is divided by the actions that the process itself runs, all or half of them. `busy
cores` is the time of all processors that a step takes, over its length: XLA's virtual devices of one process share
their threads, so there the bubble of one device is partly filled with the work of the other, which two processes of one
thread cannot do. All processes are compiled first, then take turns, so that noise of the machine meets all of them.
Two processes wait for each other more often, so work of others hurts them more: with `--quiet CORES` a round in which
others used more than that does not count, and is taken again, up to ten times as many rounds (Linux only).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import real_compute
from benchmark import PATIENCE, busy_seconds, median, print_results

from meshpipe.processes.launch import free_port

Run = list[subprocess.Popen[str]]
TINY_WIDTH, TINY_ROWS = 8, 4
TINY_STEPS = 100
"""Steps of the tiny model in a round, of which the median counts."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "zb-h1", "zb-h2"])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=["transformer", "tiny"], default=["transformer", "tiny"])
    parser.add_argument("--quiet", type=float, default=2.0, help="cores that others may use in a round that counts")
    parser.add_argument("--json")
    parser.add_argument("--answer", nargs=4, metavar=("MODEL", "SCHEDULE", "NUMBER", "PORT"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.answer is not None:
        model, schedule, number, port = flags.answer
        answer(model, schedule, flags.microbatches, int(number), int(port))
        return
    for model in flags.models:
        rows = [row for schedule in flags.schedules for row in compare(model, schedule, flags)]
        file = None if flags.json is None else flags.json.replace(".json", f".{model}.json")
        print_results(f"processes: {model}", rows, file)


def compare(model: str, schedule: str, flags: argparse.Namespace) -> list[dict[str, object]]:
    """A row for one process and a row for two, whose steps took turns."""
    runs = {count: start(model, schedule, flags.microbatches, count) for count in (1, 2)}
    repeats = TINY_STEPS if model == "tiny" else 1
    steps: dict[int, list[float]] = {1: [], 2: []}
    dispatch: dict[int, list[float]] = {1: [], 2: []}
    busy: dict[int, list[float]] = {1: [], 2: []}
    try:
        for _ in range(flags.rounds * PATIENCE):
            rounds: dict[int, list[tuple[float, float, float]]] = {}
            quiet = True
            for count, run in runs.items():
                before, begin = busy_seconds(), time.perf_counter()
                found = rounds[count] = [take_step(run) for _ in range(repeats)]
                own = sum(seconds * cores for seconds, _, cores in found)
                others = (busy_seconds() - before - own) / (time.perf_counter() - begin)
                quiet = quiet and others <= flags.quiet
            for count, found in rounds.items() if quiet else ():
                for values, into in zip(zip(*found, strict=True), (steps, dispatch, busy), strict=True):
                    into[count].append(median(values))
            if len(steps[1]) == flags.rounds:
                break
    finally:
        for run in runs.values():
            for process in reversed(run):  # the one that coordinates last
                process.kill()
                process.wait()
    actions = 2 * flags.microbatches * (3 if schedule.startswith("zb") else 2)
    ratio = median(two / one for one, two in zip(steps[1], steps[2], strict=True))
    return [
        {
            "schedule": schedule,
            "processes": count,
            "rounds": len(steps[count]),
            "step, ms": median(steps[count]) * 1e3,
            "fastest, ms": min(steps[count]) * 1e3,
            "two/one": ratio if count == 2 else 1.0,
            "busy cores": median(busy[count]),
            "step, us per action": median(steps[count]) / actions * 1e6,
            "dispatch, us per own action": median(dispatch[count]) / (actions / count) * 1e6,
        }
        for count in (1, 2)
    ]


def start(model: str, schedule: str, microbatches: int, count: int) -> Run:
    """The processes of a run, with everything compiled and two steps taken."""
    environment = os.environ | {"PJRT_NPROC": str(2 // count), "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    port = free_port() if count > 1 else 0
    run = []
    for number in range(count):
        command = [sys.executable, __file__, "--microbatches", str(microbatches)]
        command += ["--answer", model, schedule, str(number), str(port)]
        run.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment))
    for _ in range(2):
        take_step(run)
    return run


def take_step(run: Run) -> tuple[float, float, float]:
    """Seconds until all processes are through a step, the longest that one took to hand it out, and busy cores."""
    begin = time.perf_counter()
    for process in run:
        assert process.stdin is not None
        process.stdin.write("step\n")
        process.stdin.flush()
    handed_out, cpu = [], []
    for process in run:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"{process.args} ended with {process.wait()}.")
        for value, into in zip(json.loads(line), (handed_out, cpu), strict=True):
            into.append(value)
    seconds = time.perf_counter() - begin
    return seconds, max(handed_out), sum(cpu) / seconds


def answer(model: str, schedule: str, microbatches: int, number: int, port: int) -> None:
    """In a process of its own: takes a step for every line of input, and answers with the seconds of its dispatch
    and of all its threads' work.
    """
    import jax
    import optax

    import meshpipe
    from meshpipe.pipeline.ways import open_carrier
    from meshpipe.processes.config import DistributedConfig
    from meshpipe.processes.join import join

    jax.config.update("jax_num_cpu_devices", 1 if port else 2)
    if port:
        join(DistributedConfig(coordinator=f"127.0.0.1:{port}", process_id=number, process_count=2))
        open_carrier()
    layers, loss, batch = tiny(microbatches) if model == "tiny" else transformer()
    meshpipe.host.keep_freed_memory()  # as the command does
    trainer = meshpipe.Trainer(
        layers,
        loss,
        optax.sgd(real_compute.LEARNING_RATE),
        batch=batch,
        mesh=meshpipe.make_mesh(2),
        pipeline=meshpipe.PipelineConfig(schedule=schedule, num_microbatches=microbatches),
    )
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        result = trainer.step(batch)
        handed_out = time.perf_counter() - begin
        jax.block_until_ready((result.good, trainer.params))
        print(json.dumps([handed_out, time.process_time() - cpu]), flush=True)


Training = tuple[list[Callable[[Any], Any]], Callable[[Any, Mapping[str, Any]], Any], dict[str, Any]]


def transformer() -> Training:
    job = real_compute.Job()
    return real_compute.layers(job), real_compute.loss, real_compute.example(job)


def tiny(microbatches: int) -> Training:
    import numpy as np
    from flax import nnx

    layers = [lambda rngs: nnx.Linear(TINY_WIDTH, TINY_WIDTH, rngs=rngs)] * 2
    batch = {"inputs": np.ones((TINY_ROWS * microbatches, TINY_WIDTH), np.float32)}
    return layers, lambda output, batch: (output.sum(), output.size), batch


if __name__ == "__main__":
    main()
