"""One accelerator: what a pipeline of one rank costs there, against steps of the same transformer written by hand.

    python tests/benchmarks/accelerator.py [--width 1024] [--rounds 15] [--json FILE]

In one process, on the first device of JAX, whichever that is. Pre-LN transformer, plain SGD, bfloat16 with float32
parameters unless `--dtype` says otherwise. `one stage` is meshpipe with a single stage, `four stages` with four on the
one device, whose host work is that of a pipeline without its transfers. `dispatch` is the time until the step is handed
out, with nothing in front of it; for the rest of a step the host is free. All ways take turns; medians.
The second table has what the device's allocator says was in use at most, after the first step of a single stage, which
is the first thing done, against what is predicted from the compiled programs; `device_memory.py` does that for more
layouts.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import optax
from benchmark import median, print_results
from real_compute import LEARNING_RATE, WITH_MICROBATCHES, WITHOUT_MICROBATCHES, Job, example, layers, loss, plain_step

import meshpipe
from meshpipe.choose.memory import predict_memory
from meshpipe.compiled.compile_for import compile_for

STAGES = {"one stage": ("1f1b", 1), "four stages": ("interleaved-1f1b", 4)}
"""Schedule and number of stages of the ways that are meshpipe."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--plain", nargs="+", default=[*WITHOUT_MICROBATCHES, *WITH_MICROBATCHES])
    parser.add_argument("--json")
    flags = parser.parse_args()
    job = Job(
        width=flags.width,
        heads=flags.heads,
        length=flags.length,
        batch=flags.batch,
        blocks=flags.blocks,
        microbatches=flags.microbatches,
        dtype=flags.dtype,
    )
    device = jax.devices()[0]
    steps: dict[str, Callable[[], object]] = {}
    memory: dict[str, object] = {}
    for name in STAGES:
        trainer, steps[name] = pipeline_step(name, job)
        if not memory and device.memory_stats():
            jax.block_until_ready(steps[name]())
            memory = memory_row(name, trainer, device)
    steps |= {name: plain_step(name, job) for name in flags.plain}
    for step in steps.values():
        jax.block_until_ready(step())
    times = {name: [] for name in steps}
    dispatches = {name: [] for name in steps}
    for _ in range(flags.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            result = step()
            dispatches[name].append(time.perf_counter() - begin)
            jax.block_until_ready(result)
            times[name].append(time.perf_counter() - begin)
    taken = {name: median(seconds) for name, seconds in times.items()}
    accumulated = min((taken[name] for name in WITH_MICROBATCHES if name in taken), default=float("nan"))
    fastest = min((taken[name] for name in flags.plain), default=float("nan"))
    rows: list[dict[str, object]] = [
        {
            "way": name,
            "step, ms": taken[name] * 1e3,
            "fastest, ms": min(times[name]) * 1e3,
            "dispatch, ms": median(dispatches[name]) * 1e3 if name in STAGES else "",
            "step/fastest by hand": taken[name] / fastest,
            "step/fastest accumulation": taken[name] / accumulated,
            "tokens/s": job.batch * job.length / taken[name],
        }
        for name in steps
    ]
    print_results(f"one accelerator: {device.device_kind}, {job}", rows, flags.json)
    if memory:
        print_results("memory of the device, bytes", [memory])


def pipeline_step(name: str, job: Job) -> tuple[meshpipe.Trainer, Callable[[], Any]]:
    schedule, num_stages = STAGES[name]
    batch = example(job)
    trainer = meshpipe.Trainer(
        layers(job),
        loss,
        optax.sgd(LEARNING_RATE),
        batch=batch,
        mesh=meshpipe.make_mesh(1),
        pipeline=pipeline_of(job, schedule, num_stages),
    )

    def step() -> Any:
        result = trainer.step(batch)
        return result.good, trainer.params

    return trainer, step


def pipeline_of(job: Job, schedule: str, num_stages: int, remat: str = "none") -> meshpipe.PipelineConfig:
    return meshpipe.PipelineConfig(
        schedule=schedule,
        stages_per_rank=num_stages,
        num_microbatches=job.microbatches,
        partition="cost",
        remat=remat,
    )


def memory_row(name: str, trainer: meshpipe.Trainer, device: jax.Device) -> dict[str, object]:
    transformation = optax.sgd(LEARNING_RATE)
    programs = compile_for(trainer.model, transformation)
    (predicted,) = predict_memory(trainer.model, transformation, programs=programs)
    measured = device.memory_stats()["peak_bytes_in_use"]
    return {
        "way": name,
        "predicted": predicted.total,
        "of it activations": predicted.activations,
        "of it temporaries": predicted.temporaries,
        "measured": measured,
        "predicted/measured": predicted.total / measured,
    }


if __name__ == "__main__":
    main()
