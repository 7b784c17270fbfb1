"""The peak of one accelerator's allocator against what is predicted, for layouts of `accelerator.py`.

    python tests/benchmarks/device_memory.py [--target gpu:h200:1] [--layouts 0 3] [--seconds 540] [--markdown FILE]

Each layout runs in a process of its own, since the allocator's peak cannot be reset: two steps on the first device of
JAX. Predicted are the peak from the programs that ran, and, in other processes that see no accelerator and work
meanwhile, the peak from programs compiled for `--target`, which must be the same card: by default the one that is here.
A layout that fails is a row with the reason, and the others go on. After `--seconds` no layout begins. Each row is
printed, and written to the files, as soon as it is known. Exits with 1 if a layout failed or a prediction for the
target is off by more than 5 %, and with 2 where no allocator says what it had in use, as on CPU devices. `--no-run`
only predicts, on any machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmark import print_results
from real_compute import LEARNING_RATE, Job

from meshpipe.machine import format_bytes

ALLOWED = 0.05
"""Share by which a prediction may be off."""
AT_ONCE = max(1, (os.cpu_count() or 1) // 4)
"""Predictions that are made at the same time."""
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


Row = dict[str, object]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="the card; by default the one that is here")
    parser.add_argument("--layouts", type=int, nargs="+", default=range(len(LAYOUTS)), choices=range(len(LAYOUTS)))
    parser.add_argument("--no-run", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e6, help="begin no layout later than this")
    for name, default in (("width", 1024), ("heads", 16), ("length", 1024), ("batch", 64), ("blocks", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--markdown", help="file for a table of the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    sizes = ("width", "heads", "length", "batch", "blocks", "microbatches", "dtype")
    job = Job(**{name: getattr(flags, name) for name in sizes})
    if flags.one:
        layout = LAYOUTS[flags.layouts[0]]
        works = {
            "name": name_of_device,
            "run": lambda: run_here(job, layout),
            "predict": lambda: predict_for(flags.target, job, layout),
        }
        print(json.dumps(works[flags.one]()))
        return 0
    return compare(flags, job)


def compare(flags: argparse.Namespace, job: Job) -> int:
    deadline = time.monotonic() + flags.seconds
    if flags.target is None:
        found = child(flags, job, 0, "name", deadline)
        if "target" not in found:
            print(f"Say which card to predict for, as in --target gpu:h200:1: {found.get('failed')}")
            return 2
        flags.target = str(found["target"])
    title, rows = f"memory of one device: {flags.target}, {job}", list[Row]()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        predictions = {i: pool.submit(child, flags, job, i, "predict", deadline) for i in flags.layouts}
        for layout in flags.layouts:
            rows.append(row_of(flags, job, layout, predictions[layout], deadline))
            print(json.dumps(rows[-1]), flush=True)
            if flags.markdown:
                Path(flags.markdown).write_text(f"{title}\n\n{markdown(rows)}")
            if flags.json:
                Path(flags.json).write_text(json.dumps({"benchmark": title, "rows": rows}) + "\n")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print_results(title, [{name: row.get(name, "") for name in columns} for row in rows])
    print(markdown(rows))
    failed = [row for row in rows if "failed" in row]
    off = [row for row in rows if abs(float(str(row.get("predicted/measured", 1))) - 1) > ALLOWED]
    for row in (*failed, *off):
        print(f"FAILED: {row}")
    if failed or off:
        return 1
    if flags.no_run or all(row.get("measured") for row in rows):
        return 0
    print("No allocator says how much it had in use.")
    return 2


def row_of(flags: argparse.Namespace, job: Job, layout: int, prediction: Future[Row], deadline: float) -> Row:
    row: Row = dict(zip(("schedule", "stages", "remat"), LAYOUTS[layout], strict=True))
    if not flags.no_run:
        row |= child(flags, job, layout, "run", deadline)
    predicted = prediction.result()
    failed = [str(found["failed"]) for found in (row, predicted) if "failed" in found]
    row |= predicted
    if failed:
        row["failed"] = "; ".join(failed)
    elif row.get("measured"):
        row["predicted/measured"] = float(str(row["predicted for target"])) / float(str(row["measured"]))
    return row


def child(flags: argparse.Namespace, job: Job, layout: int, what: str, deadline: float) -> Row:
    """What another process finds, or why it `failed`."""
    left = deadline - time.monotonic()
    if left <= 0:
        return {"failed": f"{what}: no time was left"}
    command = [sys.executable, __file__, "--one", what, "--layouts", str(layout), "--target", str(flags.target)]
    for name, value in asdict(job).items():
        if hasattr(flags, name):
            command += [f"--{name}", str(value)]
    environment = dict(os.environ) | ({"JAX_PLATFORMS": "cpu"} if what == "predict" else {})
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=min(1800, left + 60))
        if done.returncode:
            raise ValueError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        found: Row = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"failed": f"{what}: {error}"}
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The table for docs/performance.md."""
    lines = [
        "| layout | allocator's peak | from what ran / measured | for the target / measured |",
        "|---|---|---|---|",
    ]
    for row in rows:
        remat = "" if row["remat"] == "none" else f", remat `{row['remat']}`"
        layout = f"`{row['schedule']}`, {row['stages']} stage{'s' * (row['stages'] != 1)}{remat}"
        measured = row.get("measured")
        names = ("predicted from what ran", "predicted for target")
        values = [float(str(row[name])) if name in row else None for name in names]
        if isinstance(measured, int):
            cells = ["-" if value is None else f"{value / measured:.3f}" for value in values]
        else:
            cells = ["-" if value is None else format_bytes(value) for value in values]
        cells.insert(0, format_bytes(measured) if isinstance(measured, int) else "-")
        failed = f" (failed: {row['failed']})" if "failed" in row else ""
        lines.append(f"| {layout}{failed} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def name_of_device() -> Row:
    """The first device of JAX as a target."""
    import jax

    from meshpipe.hardware.catalogue import hardware_of

    device = jax.devices()[0]
    hardware = hardware_of(device.device_kind)
    if hardware is None or hardware.platform != "gpu":
        return {"failed": f"the first device is {device.device_kind}, which is no GPU of the catalogue"}
    return {"target": f"gpu:{hardware.name}:1"}


def run_here(job: Job, layout: tuple[str, int, str]) -> Row:
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
    return {
        "device": device.device_kind,
        "measured": stats["peak_bytes_in_use"] if stats else None,
        "measured between steps": stats["bytes_in_use"] if stats else None,
        "predicted from what ran": predicted.total,
        "peak in, of what ran": predicted.peak_in,
    }


def predict_for(target: str, job: Job, layout: tuple[str, int, str]) -> Row:
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
