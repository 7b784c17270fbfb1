"""What the host does for each action: tiny stages, whose work takes no time, in one process.

    python tests/benchmarks/host_overhead.py [--schedules 1f1b zb-h1] [--json FILE]
    python tests/benchmarks/host_overhead.py --ranks 1 --schedules interleaved-1f1b looped-bfs  # all on one device

Microseconds per action of a whole step with its update, and of the engine alone, against what the same calls cost
without an engine, timed in the same run. `bare`: a call of the compiled program (the mean of those of a middle stage)
and the `jax.device_put`s onto a sharding that its values need, each in a loop of its own with its arguments at hand.
`chained`: a forward and the move of its result, which is not ready yet, one after the other as in a pipeline; for the
actions without a move only the call counts. The second table is the cost of planning, which has to grow with the number
of actions and no faster; the third that of many ranks, of which each has as many instructions as among few.
"""

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark import median, print_results, times_of
from flax import nnx

import meshpipe
from meshpipe.pipeline.transfer import transfer_to
from meshpipe.plan.lower import Transfer, lower
from meshpipe.plan.rendezvous import check_lowered
from meshpipe.plan.validate import validate
from meshpipe.sharding import Shapes
from meshpipe.stage.programs import StagePrograms, compile_stage
from meshpipe.stage.traced import TracedStage

WIDTH, ROWS = 8, 4
CALLS = 200
PLANNING = "planning: plan, validate, lower and check the transfers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--ranks", type=int, help="pipeline ranks that share the stages; as many by default")
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument("--data", type=int, default=1, help="devices of each stage")
    parser.add_argument("--schedules", nargs="+", default=["1f1b", "gpipe", "zb-h1"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json")
    flags = parser.parse_args()
    ranks = flags.ranks or flags.stages
    meshpipe.use_cpu_devices(ranks * flags.data)
    rows = [
        step_row(name, flags.stages, ranks, flags.microbatches, flags.data, flags.repeats) for name in flags.schedules
    ]
    print_results("host overhead: microseconds per action", rows, flags.json)
    sizes = [(schedule, num_ranks) for schedule in ("1f1b", "zb-h1") for num_ranks in (4, 64, 1024)]
    with meshpipe.host.no_garbage_collection():  # as the command does
        print_results(PLANNING, [planning_row("1f1b", 8 * 2**i, 32 * 2**i) for i in range(4)])
        print_results(f"{PLANNING}, more ranks", [planning_row(name, num_ranks, 64) for name, num_ranks in sizes])


def step_row(
    schedule: str, num_stages: int, num_ranks: int, num_microbatches: int, data: int, repeats: int
) -> dict[str, object]:
    batch = {"inputs": np.ones((ROWS * data * num_microbatches, WIDTH), np.float32)}
    meshpipe.host.keep_freed_memory()  # as the command does
    trainer = meshpipe.Trainer(
        [lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)] * num_stages,
        lambda output, batch: (output.sum(), output.size),
        optax.sgd(0.0),
        batch=batch,
        mesh=meshpipe.make_mesh(num_ranks, data),
        pipeline=meshpipe.PipelineConfig(
            schedule=schedule, stages_per_rank=num_stages // num_ranks, num_microbatches=num_microbatches
        ),
    )
    num_actions = len(trainer.plan.actions)
    moves = sum(isinstance(i, Transfer) for i in lower(trainer.plan).instructions)
    middle = trainer.model.traced[num_stages // 2]
    ops = {action.op for action in trainer.plan.actions}
    calls = bare_calls(middle, compile_stage(middle, ops))
    value = placed(middle.x)
    target = tuple(shape.sharding for shape in trainer.model.traced[num_stages // 2 + 1].x)
    put = call_time(lambda: jax.device_put(value, target))
    call = sum(call_time(call) for call in calls) / len(calls)
    move = transfer_to(target)
    chained = call_time(lambda: move(calls[0]()[0][0]))
    seed = trainer.model.place_seed(0)
    inputs = trainer.model.inputs(batch, seed, 0)
    params = {s: placed(stage.params) for s, stage in trainer.model.traced.items()}
    states = {s: placed(tuple(stage.spec.state.values())) for s, stage in trainer.model.traced.items()}
    run = trainer.model.executor.run
    engine = median(times_of(lambda: jax.block_until_ready(run(params, states, inputs)), repeats, warmups=3))

    def take_step() -> None:
        result = trainer.step(batch)
        jax.block_until_ready((result.good, trainer.params))

    step = median(times_of(take_step, repeats, warmups=3))
    share = moves / num_actions
    bare, in_chain = call + put * share, call + (chained - call) * share
    return {
        "schedule": schedule,
        "actions": num_actions,
        "transfers": moves,
        "call": call * 1e6,
        "device_put": put * 1e6,
        "bare": bare * 1e6,
        "chained": in_chain * 1e6,
        "engine": engine / num_actions * 1e6,
        "step": step / num_actions * 1e6,
        "step/bare": step / num_actions / bare,
        "engine/chained": engine / num_actions / in_chain,
    }


def placed(shapes: Shapes) -> tuple[jax.Array, ...]:
    return tuple(jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding) for s in shapes)


def bare_calls(stage: TracedStage, programs: StagePrograms) -> list[Callable[[], Any]]:
    """A call of each program of a middle stage, with everything at hand."""
    params, state, x, inputs = placed(stage.params), placed(stage.state), placed(stage.x), placed(stage.inputs)
    (microbatch,) = placed((stage.microbatch,))
    forward = lambda: programs.forward(params, (), state, x, inputs, microbatch, ())  # noqa: E731
    (output,), _, residuals, _ = forward()
    kept = tuple(x[i] for i in stage.kept_x), tuple(state[i] for i in stage.kept_state)
    accumulators = [programs.zeros()[0]]  # donated by each call to the next
    arguments = (params, (), inputs, microbatch, kept, residuals, output)

    if programs.backward is not None:
        backward = programs.backward

        def run_backward() -> object:
            accumulators[0], gradients = backward(accumulators[0], *arguments)
            return gradients

        return [forward, run_backward]
    parts = programs.split
    assert parts is not None
    assert parts.weight is not None
    weight = parts.weight

    def run_input() -> tuple[jax.Array, ...]:
        accumulators[0], _, crossing = parts.input(accumulators[0], *arguments)
        return crossing

    crossing = run_input()
    of_microbatch = (*kept[0], *kept[1], *residuals, *output)
    carried = tuple(of_microbatch[i] for i in parts.carried)

    def run_weight() -> object:
        accumulators[0] = weight(accumulators[0], params, (), inputs, microbatch, carried, crossing)
        return accumulators[0]

    return [forward, run_input, run_weight]


def call_time(call: Callable[[], object]) -> float:
    """Seconds of one of many calls, with the work that they hand out."""

    def calls() -> None:
        for _ in range(CALLS):
            result = call()
        jax.block_until_ready(result)

    return median(times_of(calls, 5)) / CALLS


def planning_row(schedule: str, num_ranks: int, num_microbatches: int) -> dict[str, object]:
    times = [time.perf_counter()]
    plan = meshpipe.make_plan(schedule, num_ranks, num_microbatches)
    times.append(time.perf_counter())
    validate(plan)
    times.append(time.perf_counter())
    lowered = lower(plan)
    times.append(time.perf_counter())
    check_lowered(lowered)
    times.append(time.perf_counter())
    parts = dict(zip(("plan", "validate", "lower", "check"), map(float.__sub__, times[1:], times), strict=True))
    seconds = sum(parts.values())
    return {
        "schedule": schedule,
        "ranks": num_ranks,
        "microbatches": num_microbatches,
        "actions": len(plan.actions),
        **{f"{name}, s": part for name, part in parts.items()},
        "seconds": seconds,
        "us per action": seconds / len(plan.actions) * 1e6,
        "instructions of a middle rank": len(lowered.of_rank(num_ranks // 2)),
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


if __name__ == "__main__":
    main()
