"""Time from the start of a process to the end of its first step: plain NNX and Optax against meshpipe.

    python tests/benchmarks/start_up.py [--repeats 3] [--json FILE]

Both train the model of `language_model:single` on the same batch. `plain` is one `nnx.jit` of `nnx.value_and_grad` and
`nnx.Optimizer` on one device; `one stage` is `Trainer` on one device, and `four stages` the same layers without
embedding and head, as many in each stage, against `plain, blocks` of them. Every run is a process of its own and the
kinds take turns. Processor time counts all threads, and is less noisy than elapsed time where others use the machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmark import median, print_results

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("plain", "one stage", "plain, blocks", "four stages")
BLOCKS, BATCH, SEQUENCE = 8, 32, 64
TARGETS = {("one stage", "plain"): "<= 1.3", ("four stages", "plain, blocks"): "<= 1.5"}


def run_once(kind: str, started: float) -> dict[str, float]:
    """Takes one step; elapsed seconds since `started`, and the processor's since the process began."""
    import meshpipe

    meshpipe.use_cpu_devices(4 if kind == "four stages" else 1)
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from meshpipe.models import LanguageModelConfig
    from meshpipe.models.language_model import DecoderBlock

    parts = {"import": time.process_time()}
    config = LanguageModelConfig.small()
    rng = np.random.default_rng(0)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    if "blocks" in kind or kind == "four stages":
        layers = [lambda rngs: DecoderBlock(config, rngs=rngs)] * BLOCKS
        batch = {"inputs": rng.normal(size=(BATCH, SEQUENCE, config.d_model)).astype(np.float32)}

        def loss(output, batch):
            return ((output - batch["inputs"]) ** 2).sum(), output.size
    else:
        layers, loss = config.layers(), config.loss
        tokens = rng.integers(0, 256, size=(BATCH, SEQUENCE + 1)).astype(np.int32)
        weights = np.ones((BATCH, SEQUENCE), np.float32)
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
    if kind.startswith("plain"):
        with nnx.use_eager_sharding(False):  # the axes of the parameters are names of rules, not of a mesh
            modules = nnx.List([layer(rngs=nnx.Rngs(i)) for i, layer in enumerate(layers)])
        state = nnx.Optimizer(modules, optimizer, wrt=nnx.Param)
        parts["make"] = time.process_time()

        @nnx.jit
        def step(modules, state, batch):
            def mean(modules):
                x = batch["inputs"]
                for module in modules:
                    x = module(x)
                total, weight = loss(x, batch)
                return total / weight

            value, gradients = nnx.value_and_grad(mean)(modules)
            state.update(modules, gradients)
            return value

        jax.block_until_ready(step(modules, state, batch))
    else:
        meshpipe.host.keep_freed_memory()
        stages = 4 if kind == "four stages" else 1
        with meshpipe.host.no_garbage_collection():  # as the command does
            trainer = meshpipe.Trainer(
                layers,
                loss,
                optax.adamw(1e-2),
                batch=batch,
                clip_norm=1.0,
                mesh=meshpipe.make_mesh(stages),
                pipeline=meshpipe.PipelineConfig(num_microbatches=4 * stages if stages > 1 else 1),
            )
        parts["make"] = time.process_time()
        trainer.check(trainer.step(batch))
    parts["first step"] = time.process_time()
    values = list(parts.values())
    found = {name: b - a for (name, b), a in zip(parts.items(), [0.0, *values], strict=False)}
    return {"elapsed": time.time() - started, "processor": values[-1], **found}


def run(kind: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--kind", kind, "--started", str(time.time())]
    path = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    result = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    return dict(json.loads(result.stdout.splitlines()[-1]))


def measure(repeats: int) -> list[dict[str, object]]:
    runs = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            runs[kind].append(run(kind))
    seconds = {kind: {part: median(r[part] for r in found) for part in found[0]} for kind, found in runs.items()}
    rows: list[dict[str, object]] = [{"kind": kind, **values} for kind, values in seconds.items()]
    for (over, under), target in TARGETS.items():
        for part, wanted in (("processor", target), ("elapsed", "")):
            value = seconds[over][part] / seconds[under][part]
            rows.append({"ratio": f"{over} / {under}: {part}", "value": value, "target": wanted})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; medians are shown")
    parser.add_argument("--json", help="file for the line of JSON")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind is not None:
        print(json.dumps(run_once(options.kind, options.started)))
    else:
        print_results("start-up", measure(options.repeats), options.json)


if __name__ == "__main__":
    main()
