"""Saving and restoring against writing and reading one file of as many bytes, and how long a save holds up the loop.

    python tests/benchmarks/checkpoint.py [--megabytes 384] [--processes 1] [--folder DIR] [--rounds 5] [--json FILE]

Stages on eight virtual CPU devices hold the arrays of a transformer with Adam, 4 MiB each, sharded over the tensor
axis. A checkpoint has them in files of 2 MiB and a description of each array; the raw file has the same bytes in one.
Saves, restores, and raw files take turns, in reverse every second round; medians are shown.

Both sides reach the disk: a raw write ends with an fsync of its file, a save with those of all its files and folders.
Both sides are dropped from the page cache before they are read. Raw files are written and read by one thread, in pieces
of 1 MiB, as by `dd`. `raw write, early` has the disk begin with each piece at once, as a save does, and not only with
the fsync. `raw read` reads everything into one buffer, which stays in the processor's cache; `raw read, kept` into as
much new memory as a restore fills, which is the fair comparison: restored arrays need memory of their own, which the
system has to find and clear. A restore ends when all arrays are on their devices.

Before each action as much memory as it can need is written to and freed: a virtual machine may have to get free memory
back from its host, which takes longer than the action and would fall on whichever comes first. What a round has written
is removed and synced after it. The first round is not counted. `cpu` is the time of all processors that this process
used, which others that use the machine change less than the seconds; of `held up`, that of the thread that calls
`save`. With `--processes N` each process writes and reads a raw file of its own share at the same time as the others,
and an action ends when it has ended in all.
Times are those of one disk and machine, and of what else it does: compare ratios.
"""

import argparse
import gc
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CHUNK = 1 << 20
DEVICES = 8
ACTIONS = ("raw write", "raw write, early", "save", "raw read", "raw read, kept", "restore", "restore half")
RATIOS = {
    "raw write, early": ("raw write, early", "save"),
    "save": ("raw write", "save"),
    "held up": ("held up", "save"),
    "restore": ("raw read", "restore"),
    "restore half": ("raw read, kept", "restore"),  # both of all bytes; the half has no ratio of its own
}
"""By the row in which each stands, what is divided by what."""
Times = dict[str, list[float]]


def make_trees(megabytes: int, processes: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The arrays of the stages of this process, and the shapes of all stages."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import meshpipe
    from meshpipe.mesh import submeshes

    width, stages = 1024, max(2, processes)
    layers = max(1, megabytes * (1 << 20) // (stages * 3 * 4 * width * width))
    random = np.random.default_rng(0)
    meshes = submeshes(meshpipe.make_mesh(stages, DEVICES // stages // 2, 2))

    def tree(stage: int, make: Callable[[NamedSharding], Any]) -> dict[str, Any]:
        place = NamedSharding(meshes[stage], PartitionSpec(None, "tensor"))
        names = [f"layers/{stage * layers + i}/kernel" for i in range(layers)]
        return {section: {name: make(place) for name in names} for section in ("params", "mu", "nu")}

    def array(place: NamedSharding) -> Any:
        return jax.device_put(random.normal(size=(width, width)).astype(np.float32), place)

    def shape(place: NamedSharding) -> Any:
        return jax.ShapeDtypeStruct((width, width), np.float32, sharding=place)

    local = [bool(set(mesh.devices.flat) & set(jax.local_devices())) for mesh in meshes]
    trees = [tree(i, array) if local[i] else {"params": {}, "mu": {}, "nu": {}} for i in range(stages)]
    return trees, [tree(i, shape) for i in range(stages)]


def forget(path: Path) -> None:
    """Drops files from the page cache."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_memory(size: int) -> None:
    import numpy as np

    np.ones(size, np.uint8)


def raw_write(path: Path, arrays: list[Any], early: bool = False) -> None:
    from meshpipe.checkpoint.contents import begin_writeback

    with open(path, "wb", buffering=0) as file:
        done = 0
        for array in arrays:
            whole = memoryview(array).cast("B")
            for start in range(0, len(whole), CHUNK):
                count = file.write(whole[start : start + CHUNK])
                if early:
                    begin_writeback(file, done, count)
                done += count
        os.fsync(file.fileno())


def raw_read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def raw_read_kept(path: Path) -> Any:
    import numpy as np

    memory = memoryview(np.empty(path.stat().st_size, np.uint8))
    with open(path, "rb", buffering=0) as file:
        done = 0
        while count := file.readinto(memory[done : done + CHUNK]):
            done += count
    return memory.obj


def measure(
    folder: Path, options: argparse.Namespace, number: int, barrier: Callable[[], None]
) -> tuple[int, Times, Times]:
    """The bytes of the arrays of all processes, the seconds of every action in every round, until it has ended in all
    processes, and those of the processors in this one. `barrier` waits for all processes.
    """
    import jax
    import numpy as np

    from meshpipe.checkpoint import Checkpointer

    arrays, shapes = make_trees(options.megabytes, options.processes)
    values = [np.asarray(shard.data) for a in jax.tree.leaves(arrays) for shard in a.addressable_shards[:2]]
    raw, early = folder / f"raw_{number}", folder / f"early_{number}"
    share = sum(value.nbytes for value in values)
    seconds: Times = {name: [] for name in (*ACTIONS, "held up")}
    cpu: Times = {name: [] for name in (*ACTIONS, "held up")}

    def timed(name: str, action: Callable[[], Any], *cold: Path) -> None:
        for path in cold:
            forget(path)
        warm_memory(2 * share)
        barrier()
        start, start_cpu = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(action())
        barrier()
        seconds[name].append(time.perf_counter() - start)
        cpu[name].append(time.process_time() - start_cpu)
        # To free the result is no part of any action. Memory that XLA let go of in its own threads is freed by the next
        # garbage collection, which would fall into a save.
        del result
        gc.collect()

    with Checkpointer(folder / "run", keep=0) as checkpointer:

        def save(step: int) -> None:
            start, start_cpu = time.perf_counter(), time.thread_time()
            checkpointer.save(step, arrays, {}, shapes)
            seconds["held up"].append(time.perf_counter() - start)
            cpu["held up"].append(time.thread_time() - start_cpu)
            checkpointer.wait()

        for step in range(options.rounds + 1):
            saved, half = folder / "run" / str(step), shapes[: len(shapes) // 2]
            writes: list[tuple[Any, ...]] = [
                ("raw write", lambda: raw_write(raw, values)),
                ("raw write, early", lambda: raw_write(early, values, early=True)),
                ("save", lambda step=step: save(step)),
            ]
            reads: list[tuple[Any, ...]] = [
                ("raw read", lambda: raw_read(raw), raw),
                ("raw read, kept", lambda: raw_read_kept(raw), raw),
                ("restore", lambda step=step: checkpointer.restore(step, shapes), saved),
                ("restore half", lambda step=step, half=half: checkpointer.restore(step, half), saved),
            ]
            for actions in (writes, reads):
                for action in reversed(actions) if step % 2 else actions:
                    timed(*action)
            raw.unlink()  # so that nothing is written over, nor removed while something is timed
            early.unlink()
            barrier()
            if number == 0:
                shutil.rmtree(saved)
                os.sync()
            barrier()
    return share * options.processes, *(
        {name: values[1:] for name, values in times.items()} for times in (seconds, cpu)
    )


def rows_of(size: int, seconds: Times, cpu: Times) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, values in seconds.items():
        # The raw files and the checkpoints have the same bytes; half of the stages have half of them.
        speed = "" if name == "held up" else size / (2 if name == "restore half" else 1) / median(values) / 1e6
        row = {
            "action": name,
            "seconds": median(values),
            "cpu": median(cpu[name]),
            "MB/s": speed,
        }
        if name in RATIOS:
            above, below = RATIOS[name]
            # Of each round, so that what else the machine did meets both.
            ratio = median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))
            rows.append(row | {"ratio": f"{above} / {below}", "value": ratio})
        else:
            rows.append(row | {"ratio": "", "value": ""})
    return rows


def run(options: argparse.Namespace, number: int, port: int) -> None:
    """One process of the benchmark; process 0 prints the results."""
    import meshpipe

    meshpipe.use_cpu_devices(DEVICES // options.processes)
    if options.processes > 1:
        from meshpipe.processes.config import DistributedConfig
        from meshpipe.processes.coordination import barrier
        from meshpipe.processes.guard import leave
        from meshpipe.processes.join import join

        place = {"coordinator": f"127.0.0.1:{port}", "process_id": number, "process_count": options.processes}
        join(DistributedConfig(**place))
        barriers = iter(range(1 << 30))
        size, *times = measure(options.folder, options, number, lambda: barrier(f"benchmark/{next(barriers)}", 600))
    else:
        size, *times = measure(options.folder, options, number, lambda: None)
    if number == 0:
        title = f"checkpoint of {size / 1e6:.0f} MB, {options.processes} process(es)"
        print_results(title, rows_of(size, *times), options.json)
    if options.processes > 1:
        leave(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=384, help="about how much to save")
    parser.add_argument("--rounds", type=int, default=5, help="medians are shown")
    parser.add_argument("--processes", type=int, choices=(1, 2, 4), default=1)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder is made in it")
    parser.add_argument("--json", help="file for the line of JSON")
    parser.add_argument("--part", nargs=2, type=int, metavar=("NUMBER", "PORT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        run(options, *options.part)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        if options.processes == 1:
            options.folder = folder
            run(options, 0, 0)
            return
        from meshpipe.processes.launch import free_port

        port = free_port()
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--part"]
        parts = [subprocess.Popen([*command, str(i), str(port)]) for i in range(options.processes)]
        sys.exit(max(part.wait() for part in parts))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
