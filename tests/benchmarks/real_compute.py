"""A transformer on two devices of one thread each, against the fastest step of the same on one device with one thread.

    python tests/benchmarks/real_compute.py [--rounds 5] [--schedules 1f1b zb-v] [--json FILE]

Pre-LN transformer: 8 layers, d_model 256, 8 heads, sequence 128, byte vocabulary, batch 32, plain SGD, 8 microbatches.
T1 is the fastest of several ways to write the step by hand with `PJRT_NPROC=1`; `T1/(2 step)` is how much of two
devices a schedule makes use of. The last rows are meshpipe with a single stage on the one device, against the fastest
way that accumulates gradients over microbatches. Every way has its own process, which keeps the memory that it frees;
all are compiled first, then take turns, so that noise of the machine meets all of them. With `--quiet CORES` a round in
which others used more than that does not count, and is taken again, up to ten times as many rounds (Linux only).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmark import PATIENCE, busy_seconds, median, print_results

LEARNING_RATE = 1e-2
WITHOUT_MICROBATCHES = ("one jit", "two programs")
WITH_MICROBATCHES = ("scan", "grad and accumulate", "two programs, microbatches")
TWO_STAGES_PER_RANK = ("interleaved-1f1b", "looped-bfs", "zb-v", "dualpipe-v")
SCHEDULES = ("1f1b", "gpipe", "interleaved-1f1b", "looped-bfs", "zb-h1", "zb-h2", "zb-v", "auto")


@dataclass(frozen=True)
class Job:
    """A transformer and its batch."""

    width: int = 256
    heads: int = 8
    length: int = 128
    vocabulary: int = 256
    batch: int = 32
    blocks: int = 8
    microbatches: int = 8
    dtype: str = "float32"
    """Of the computation; parameters and their gradients are float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--plain", nargs="+", default=[*WITHOUT_MICROBATCHES, *WITH_MICROBATCHES])
    parser.add_argument("--quiet", type=float, default=2.0, help="cores that others may use in a round that counts")
    parser.add_argument("--json")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.way is not None:
        answer(flags.way)
        return
    plain = flags.plain
    ways = [*plain, "one stage", *flags.schedules]
    processes = {way: start(way, threads=1 if way in plain or way == "one stage" else 2) for way in ways}
    times = {way: [] for way in ways}
    try:
        for _ in range(flags.rounds * PATIENCE):
            before, begin = busy_seconds(), time.perf_counter()
            found = {way: take_step(process) for way, process in processes.items()}
            own = sum(cpu for _, cpu in found.values())
            if (busy_seconds() - before - own) / (time.perf_counter() - begin) <= flags.quiet:
                for way, (seconds, _) in found.items():
                    times[way].append(seconds)
            if len(times[ways[0]]) == flags.rounds:
                break
    finally:
        for process in processes.values():
            process.kill()
    step = {way: median(seconds) for way, seconds in times.items()}
    one_device = min(step[way] for way in plain)
    accumulated = min(step[way] for way in WITH_MICROBATCHES if way in plain)
    rows: list[dict[str, object]] = []
    for way in ways:
        devices = 2 if way in flags.schedules else 1
        rows.append(
            {
                "way": way,
                "devices": devices,
                "step, s": step[way],
                "fastest, s": min(times[way]),
                "rounds": len(times[way]),
                "T1/(devices x step)": one_device / (devices * step[way]),
                "step/fastest accumulation": step[way] / accumulated if devices == 1 else "",
            }
        )
    print_results("real compute", rows, flags.json)


def start(way: str, threads: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PJRT_NPROC": str(threads), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--way", way]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    take_step(process)  # compiles; one after the other, as compiling takes all cores
    take_step(process)
    return process


def take_step(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Seconds of a step, and of all its threads' work."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("step\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args} ended with {process.wait()}.")
    seconds, cpu = json.loads(line)
    return seconds, cpu


def answer(way: str) -> None:
    """In a process of its own: takes a step for every line of input, and answers with its seconds."""
    job = Job()
    step = plain_step(way, job) if way in WITHOUT_MICROBATCHES + WITH_MICROBATCHES else pipeline_step(way, job)
    for _ in sys.stdin:
        begin, cpu = time.perf_counter(), time.process_time()
        step()
        print(json.dumps([time.perf_counter() - begin, time.process_time() - cpu]), flush=True)


def pipeline_step(way: str, job: Job) -> Callable[[], None]:
    import jax
    import optax

    jax.config.update("jax_num_cpu_devices", 1 if way == "one stage" else 2)
    import meshpipe

    batch = example(job)
    schedule = "1f1b" if way == "one stage" else way
    partition = "measured" if way == "auto" else "even"
    if way in TWO_STAGES_PER_RANK:
        partition = "0,3,5,7"  # two of the eight blocks each; the layers before and after them are light
    meshpipe.host.keep_freed_memory()  # as the command does
    trainer = meshpipe.Trainer(
        layers(job),
        loss,
        optax.sgd(LEARNING_RATE),
        batch=batch,
        mesh=meshpipe.make_mesh(1 if way == "one stage" else 2),
        pipeline=meshpipe.PipelineConfig(schedule=schedule, num_microbatches=job.microbatches, partition=partition),
    )

    def step() -> None:
        result = trainer.step(batch)
        jax.block_until_ready((result.good, trainer.params))

    return step


def plain_step(way: str, job: Job) -> Callable[[], None]:
    """A step written by hand, with parameters of its own."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from meshpipe.host import keep_freed_memory

    keep_freed_memory()  # as the command does
    graph, params = nnx.split(nnx.List([make(nnx.Rngs(i)) for i, make in enumerate(layers(job))]))
    batch = example(job)
    parts = {k: v.reshape(job.microbatches, -1, *v.shape[1:]) for k, v in batch.items()}
    microbatches = [{k: v[i] for k, v in parts.items()} for i in range(job.microbatches)]

    def mean_loss(params: Any, batch: Mapping[str, Any]) -> Any:
        x = batch["inputs"]
        for layer in nnx.merge(graph, params):
            x = layer(x)
        total, _ = loss(x, batch)
        return total / (job.batch * job.length)

    def updated(params: Any, gradients: Any) -> Any:
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, gradients)

    gradient = jax.grad(mean_loss)
    update = jax.jit(updated, donate_argnums=0)
    forward = jax.jit(lambda params, batch: jax.vjp(partial(mean_loss, batch=batch), params))
    backward = jax.jit(lambda pull_back: pull_back(jnp.ones(()))[0])
    add_backward = jax.jit(
        lambda total, pull_back: jax.tree.map(jnp.add, total, pull_back(jnp.ones(()))[0]), donate_argnums=0
    )
    accumulate = jax.jit(
        lambda total, params, batch: jax.tree.map(jnp.add, total, gradient(params, batch)), donate_argnums=0
    )
    zeros = jax.jit(lambda params: jax.tree.map(jnp.zeros_like, params))

    def one_jit(params: Any) -> Any:
        return updated(params, gradient(params, batch))

    def scan(params: Any) -> Any:
        def body(total: Any, part: Any) -> Any:
            return jax.tree.map(jnp.add, total, gradient(params, part)), None

        total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, params), parts)
        return updated(params, total)

    def grad_and_accumulate(params: Any) -> Any:
        total = zeros(params)
        for microbatch in microbatches:
            total = accumulate(total, params, microbatch)
        return update(params, total)

    def two_programs(params: Any) -> Any:
        _, pull_back = forward(params, batch)
        return update(params, backward(pull_back))

    def two_programs_microbatches(params: Any) -> Any:
        total = zeros(params)
        for microbatch in microbatches:
            _, pull_back = forward(params, microbatch)
            total = add_backward(total, pull_back)
        return update(params, total)

    take = {
        "one jit": jax.jit(one_jit, donate_argnums=0),
        "scan": jax.jit(scan, donate_argnums=0),
        "grad and accumulate": grad_and_accumulate,
        "two programs": two_programs,
        "two programs, microbatches": two_programs_microbatches,
    }[way]
    state = [params]

    def step() -> None:
        state[0] = jax.block_until_ready(take(state[0]))

    return step


def layers(job: Job) -> list[Callable[[Any], Any]]:
    from flax import nnx

    width, kwargs = job.width, {"dtype": job.dtype}

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm1, self.norm2 = (nnx.LayerNorm(width, rngs=rngs, **kwargs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(job.heads, width, decode=False, rngs=rngs, **kwargs)
            self.up = nnx.Linear(width, 4 * width, rngs=rngs, **kwargs)
            self.down = nnx.Linear(4 * width, width, rngs=rngs, **kwargs)

        def __call__(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    class Head(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.LayerNorm(width, rngs=rngs, **kwargs)
            self.output = nnx.Linear(width, job.vocabulary, rngs=rngs, **kwargs)

        def __call__(self, x: Any) -> Any:
            return self.output(self.norm(x))

    return [lambda rngs: nnx.Embed(job.vocabulary, width, rngs=rngs, **kwargs), *[Block] * job.blocks, Head]


def loss(output: Any, batch: Mapping[str, Any]) -> Any:
    import optax

    losses = optax.softmax_cross_entropy_with_integer_labels(output.astype("float32"), batch["labels"])
    return losses.sum(), losses.size


def example(job: Job) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    shape = job.batch, job.length
    return {name: rng.integers(0, job.vocabulary, shape, dtype=np.int32) for name in ("inputs", "labels")}


if __name__ == "__main__":
    main()
