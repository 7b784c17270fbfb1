"""The peak host memory of a start with published weights and of an import, and both against reading the same bytes.

    python tests/benchmarks/weights.py [--megabytes 400] [--processes 1 2 4] [--dtype bfloat16] [--rounds 3]
        [--folder DIR] [--json FILE]

A folder of random weights of a Llama is made, in two files with an index. `meshpipe train --init-from` of it runs over
1, 2 and 4 processes, with two stages and two devices along the tensor axis, until each process has its weights; so
four processes read half of each matrix. `peak` is the largest resident memory from there on where the command begins
to read, less what is resident there; `own` are the bytes of the shards on the devices of the process. The largest ratio
of all processes is shown, and the benchmark ends with 1 if it is above 1.1.

`meshpipe weights import` is a command of one process, which holds a few pieces at a time, whatever the model has; its
peak is less what the process has before it begins.

`raw read` reads the files into one buffer, in pieces of 1 MiB; `raw read, kept` into new memory. The files are dropped
from the page cache before each. `raw copy` writes as many bytes as the import does, float32, while it reads, and ends
with an fsync. The seconds of a start are those of reading, of the slowest process. Actions take turns; medians are
shown. Times are those of one disk and machine, and of what else it does: compare ratios.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark import median, print_results
from checkpoint import CHUNK, forget, raw_read, raw_read_kept

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
ALLOWED = 1.1
WIDTH = 1024


def make_folder(folder: Path, megabytes: int, dtype: str) -> None:
    """Random weights of a Llama, in two files."""
    import jax
    import numpy as np

    from meshpipe.layers.examine import abstract_layers
    from meshpipe.models import LanguageModelConfig
    from meshpipe.weights.architectures import table_of, write_config

    itemsize = jax.numpy.dtype(dtype).itemsize
    blocks = max(2, round(megabytes * 1e6 / (itemsize * 12 * WIDTH**2)) // 2 * 2)
    model = LanguageModelConfig(
        d_model=WIDTH, num_blocks=blocks, num_heads=8, num_kv_heads=8, d_hidden=WIDTH * 8 // 3 // 128 * 128,
        vocab_size=512,
    )  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(model)))
    leaves = {path: leaf for layer in abstract_layers(model.layers(), None) for path, leaf in layer.params.items()}
    shapes = {entry.name: entry.tensor_shape(leaves[entry.path].shape) for entry in table_of(model).entries}
    names, index, random = list(shapes), {}, np.random.default_rng(0)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        header, end = {}, 0
        for name in part:
            begin, end = end, end + itemsize * int(np.prod(shapes[name]))
            kind = {"bfloat16": "BF16", "float32": "F32"}[dtype]
            header[name] = {"dtype": kind, "shape": shapes[name], "data_offsets": [begin, end]}
            index[name] = f"model-{number}.safetensors"
        text = json.dumps(header).encode()
        with open(folder / f"model-{number}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in part:
                file.write(random.standard_normal(shapes[name], np.float32).astype(dtype).tobytes())
            os.fsync(file.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def memory_of(name: str) -> int:
    """Bytes of this process: `VmRSS` are resident, `VmHWM` were at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measured(action: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What an action returns, its seconds, and by how much the memory grows at most meanwhile."""
    forget_peak()
    before, began = memory_of("VmRSS"), time.perf_counter()
    result = action()
    seconds = time.perf_counter() - began
    return result, {"seconds": seconds, "peak": memory_of("VmHWM") - before, "before": before}


def part_start(arguments: list[str]) -> None:
    """`meshpipe train` until the weights are there."""
    import jax

    from meshpipe.cli import main
    from meshpipe.processes.coordination import barrier
    from meshpipe.processes.guard import leave
    from meshpipe.runs.start import Start

    read = Start.read

    def reads(self: Start, shapes: Any) -> Any:
        if jax.process_count() > 1:
            barrier("begin", 300.0)
        found, values = measured(lambda: jax.block_until_ready(read(self, shapes).trees))
        shards = [shard for leaf in jax.tree.leaves(found) for shard in leaf.addressable_shards]
        values["own"] = sum({shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in shards}.values())
        print("RESULT", json.dumps(values), flush=True)
        if jax.process_count() > 1:
            barrier("end", 300.0)
            leave(0)
        os._exit(0)

    Start.read = reads  # type: ignore[method-assign]
    main(arguments)


def part_import(arguments: list[str]) -> None:
    import meshpipe
    from meshpipe.exchange.importing import import_weights

    meshpipe.use_cpu_devices(1)
    _, values = measured(lambda: import_weights(*arguments))
    print("RESULT", json.dumps(values), flush=True)


def raw_copy(files: list[Path], to: Path, times: int) -> None:
    with open(to, "wb", buffering=0) as target:
        for file in files:
            with open(file, "rb", buffering=0) as source:
                while piece := source.read(CHUNK):
                    for _ in range(times):
                        target.write(piece)
        os.fsync(target.fileno())


def run_parts(part: str, arguments: list[list[str]]) -> list[dict[str, float]]:
    """What the processes of one action measure."""
    command = [sys.executable, __file__, "--part", part]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([*command, *own], stdout=subprocess.PIPE, text=True, env=environment) for own in arguments
    ]
    results = []
    for process in started:
        output, _ = process.communicate(timeout=600)
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        if process.returncode or not lines:
            raise SystemExit(f"A process of {part} ended with {process.returncode}:\n{output}")
        results.append(json.loads(lines[0].removeprefix("RESULT ")))
    return results


def start(weights: Path, processes: int) -> list[dict[str, float]]:
    from meshpipe.processes.launch import free_port

    recipe = f"{ROOT / 'tests' / 'published_recipes.py'}:pipeline"
    flags = ["train", recipe, "--mesh.tensor", "2", "--init-from", str(weights)]
    if processes == 1:
        return run_parts("start", [flags])
    place = ["--coordinator", f"127.0.0.1:{free_port()}", "--process-count", str(processes), "--process-id"]
    return run_parts("start", [[*flags, *place, str(number)] for number in range(processes)])


def seconds_of(action: Callable[[], Any]) -> list[dict[str, float]]:
    began = time.perf_counter()
    action()
    return [{"seconds": time.perf_counter() - began}]


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[list[dict[str, float]]]]:
    """Of every action, what its processes measure in each round."""
    weights = folder / "weights"
    make_folder(weights, options.megabytes, options.dtype)
    files = sorted(weights.glob("*.safetensors"))
    times = 2 if options.dtype == "bfloat16" else 1

    def read_all(read: Callable[[Path], Any]) -> Callable[[], list[dict[str, float]]]:
        return lambda: seconds_of(lambda: [read(file) for file in files])

    actions: dict[str, Callable[[], list[dict[str, float]]]] = {
        "raw read": read_all(raw_read),
        "raw read, kept": read_all(raw_read_kept),
        **{f"start, {n} process(es)": lambda n=n: start(weights, n) for n in options.processes},
        "raw copy": lambda: seconds_of(lambda: raw_copy(files, folder / "copy", times)),
        "import": lambda: run_parts("import", [[str(weights), str(folder / "imported")]]),
    }
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in actions}
    for number in range(options.rounds):
        for name in reversed(actions) if number % 2 else actions:
            forget(weights)
            found[name].append(actions[name]())
            (folder / "copy").unlink(missing_ok=True)
            shutil.rmtree(folder / "imported", ignore_errors=True)
            os.sync()
    return found


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        {"start": part_start, "import": part_import}[sys.argv[2]](sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400, help="about how much the files have")
    parser.add_argument("--processes", type=int, nargs="+", choices=(1, 2, 4), default=(1, 2, 4))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the files")
    parser.add_argument("--rounds", type=int, default=3, help="medians of times are shown, and the largest peaks")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder is made in it")
    parser.add_argument("--json", help="file for the line of JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        found = measure(folder, options)
        size = sum(file.stat().st_size for file in (folder / "weights").glob("*.safetensors"))
    finally:
        shutil.rmtree(folder)
    seconds = {name: [max(part["seconds"] for part in parts) for parts in rounds] for name, rounds in found.items()}
    rows: list[dict[str, object]] = []
    too_much = False
    for name, rounds in found.items():
        parts = [part for parts in rounds for part in parts]
        row: dict[str, object] = {
            "action": name,
            "seconds": median(seconds[name]),
            "MB/s": size / median(seconds[name]) / 1e6,
        }
        for raw in ("raw read", "raw read, kept", "raw copy"):
            row[f"{raw} / it"] = median(a / b for a, b in zip(seconds[raw], seconds[name], strict=True))
        for value in ("before", "own", "peak"):
            row[f"{value}, MB"] = max(part[value] for part in parts) / 1e6 if value in parts[0] else ""
        row["peak / own"] = max(part["peak"] / part["own"] for part in parts) if "own" in parts[0] else ""
        too_much |= "own" in parts[0] and row["peak / own"] > ALLOWED  # type: ignore[operator]
        rows.append(row)
    print_results(f"published weights of {size / 1e6:.0f} MB, {options.dtype}", rows, options.json)
    sys.exit(int(too_much))


if __name__ == "__main__":
    main()
