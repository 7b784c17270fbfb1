"""The peak of one accelerator's allocator against what is predicted, for layouts of `accelerator.py`.

    python tests/benchmarks/device_memory.py --target gpu:h100:1 [--layouts 0 3] [--width 1024] [--json FILE]

Each layout runs in a process of its own, since the allocator's peak cannot be reset: two steps on the first device of
JAX. Predicted are the peak from the programs that ran, and, in another process that sees no accelerator, the peak from
programs compiled for `--target`, which must name the same card. Exits with 1 if the latter is off by more than 5 %, and
with 2 where no allocator says what it had in use. `--no-run` only predicts, on any machine.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from real_compute import LEARNING_RATE, Job

ALLOWED = 0.05
"""Share by which a prediction may be off."""
LAYOUTS = (
    ("1f1b", 1, "none"),
    ("1f1b", 1, "dots_saveable"),
    ("1f1b", 1, "layer"),
    ("gpipe", 1, "none"),
    ("gpipe", 1, "layer"),
    ("gpipe", 1, "full"),
    ("interleaved-1f1b", 4, "none"),
    ("interleaved-1f1b", 4, "layer"),
    ("zb-h1", 1, "none"),
    ("zb-h1", 1, "layer"),
)
"""Schedule, stages on the one rank, and rematerialisation."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="gpu:h100:1")
    parser.add_argument("--layouts", type=int, nargs="+", default=range(len(LAYOUTS)), choices=range(len(LAYOUTS)))
    parser.add_argument("--no-run", action="store_true")
    for name, default in (("width", 1024), ("heads", 16), ("length", 1024), ("batch", 64), ("blocks", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    sizes = ("width", "heads", "length", "batch", "blocks", "microbatches", "dtype")
    job = Job(**{name: getattr(flags, name) for name in sizes})
    if flags.one:
        layout = LAYOUTS[flags.layouts[0]]
        found = run_here(job, layout) if flags.one == "run" else predict_for(flags.target, job, layout)
        print(json.dumps(found))
        return 0
    return compare(flags, job)


def compare(flags: argparse.Namespace, job: Job) -> int:
    from benchmark import print_results

    rows: list[dict[str, object]] = []
    for layout in flags.layouts:
        row: dict[str, object] = dict(zip(("schedule", "stages", "remat"), LAYOUTS[layout], strict=True))
        if not flags.no_run:
            row |= child(flags, job, layout, "run")
        row |= child(flags, job, layout, "predict")
        if row.get("measured"):
            row["predicted/measured"] = row["predicted for target"] / row["measured"]  # type: ignore[operator]
        rows.append(row)
        print(row, flush=True)
    print_results(f"memory of one device: {flags.target}, {job}", rows, flags.json)
    if flags.no_run:
        return 0
    if not all(row.get("measured") for row in rows):
        print("No allocator says how much it had in use.")
        return 2
    off = [row for row in rows if abs(float(str(row["predicted/measured"])) - 1) > ALLOWED]
    for row in off:
        print(f"FAILED: {row}")
    return 1 if off else 0


def child(flags: argparse.Namespace, job: Job, layout: int, what: str) -> dict[str, object]:
    """What another process finds, which ends before the next begins."""
    command = [sys.executable, __file__, "--one", what, "--layouts", str(layout), "--target", flags.target]
    for name, value in asdict(job).items():
        if hasattr(flags, name):
            command += [f"--{name}", str(value)]
    environment = dict(os.environ) | ({"JAX_PLATFORMS": "cpu"} if what == "predict" else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{what} of layout {layout} failed:\n{done.stderr}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_here(job: Job, layout: tuple[str, int, str]) -> dict[str, object]:
    """The peak of the device's allocator over two steps, and the prediction from the programs that ran."""
    import jax
    import optax
    from accelerator import pipeline_of
    from real_compute import example, layers, loss

    import meshpipe
    from meshpipe.choose.memory import predict_memory
    from meshpipe.compiled.compile_for import compile_for

    batch, transformation, device = example(job), optax.sgd(LEARNING_RATE), jax.devices()[0]
    trainer = meshpipe.Trainer(
        layers(job), loss, transformation, batch=batch, mesh=meshpipe.make_mesh(1), pipeline=pipeline_of(job, *layout)
    )
    for _ in range(2):
        jax.block_until_ready((trainer.step(batch).good, trainer.params))
    stats = device.memory_stats()
    programs = compile_for(trainer.model, transformation)
    (predicted,) = predict_memory(trainer.model, transformation, programs=programs)
    measured = stats["peak_bytes_in_use"] if stats else None
    return {"device": device.device_kind, "measured": measured, "predicted from what ran": predicted.total}


def predict_for(target: str, job: Job, layout: tuple[str, int, str]) -> dict[str, object]:
    """The prediction from programs that were compiled for a target."""
    import jax
    import optax
    from accelerator import pipeline_of
    from real_compute import example, layers, loss

    from meshpipe.choose.chooser import Chooser
    from meshpipe.choose.memory import predict_memory
    from meshpipe.compiled.compile_for import compile_for
    from meshpipe.compiler.topology import devices_of
    from meshpipe.hardware.target_name import parse_target
    from meshpipe.layers.task import Task
    from meshpipe.mesh import make_mesh

    jax.config.update("jax_platforms", "cpu")
    described, transformation = parse_target(target), optax.sgd(LEARNING_RATE)
    task: Any = Task(layers(job), loss, batch=example(job))
    chooser = Chooser(
        task,
        transformation,
        mesh=make_mesh(1, devices=devices_of(described)),
        config=pipeline_of(job, *layout),
        count_because="the device is only described",
    )
    model = chooser.choose()
    programs = compile_for(model, transformation)
    (predicted,) = predict_memory(model, transformation, programs=programs)
    return {
        "predicted for target": predicted.total,
        "arrays": predicted.arrays,
        "temporaries": predicted.temporaries,
        "peak in": predicted.peak_in,
    }


if __name__ == "__main__":
    sys.exit(main())
