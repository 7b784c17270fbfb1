"""Saving and restoring against writing and reading one file of as many bytes, and how long a save holds up the loop.

Two stages of 2 x 2 virtual CPU devices hold the arrays of a transformer with Adam. Saves, restores, and raw files take
turns. Everything is written through to the disk, and dropped from the page cache before it is read. Times are those of
one disk and machine: compare ratios. The first save of a process, which makes Orbax ready, is not counted.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmark import median, print_results

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CHUNK = 1 << 22


def trees(megabytes: int) -> list[dict[str, dict[str, Any]]]:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    import meshpipe
    from meshpipe.mesh import submeshes

    width = 1024
    layers = max(1, megabytes * (1 << 20) // (2 * 3 * 4 * width * width))
    random = np.random.default_rng(0)

    def array(mesh: jax.sharding.Mesh) -> jax.Array:
        values = random.normal(size=(width, width)).astype(np.float32)
        return jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, "tensor")))

    return [
        {
            section: {f"layers/{stage * layers + i}/kernel": array(mesh) for i in range(layers)}
            for section in ("params", "mu", "nu")
        }
        for stage, mesh in enumerate(submeshes(meshpipe.make_mesh(2, 2, 2)))
    ]


def forget(folder: Path) -> None:
    """Drops files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def raw_write(path: Path, arrays: list[Any]) -> None:
    with open(path, "wb", buffering=0) as file:
        for array in arrays:
            file.write(memoryview(array).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def raw_read(path: Path) -> None:
    buffer = bytearray(CHUNK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def measure(folder: Path, megabytes: int, rounds: int) -> tuple[int, dict[str, list[float]]]:
    """The bytes of the arrays, and the seconds of every kind of action in every round."""
    import meshpipe

    meshpipe.use_cpu_devices(8)
    import jax
    import numpy as np

    from meshpipe.checkpoint import Checkpointer

    arrays = trees(megabytes)
    values = [np.asarray(leaf) for leaf in jax.tree.leaves(arrays)]
    found: dict[str, list[float]] = {
        name: [] for name in ("raw write", "save", "held up", "raw read", "restore", "restore half")
    }
    with Checkpointer(folder / "run", keep=1) as checkpointer:
        for step in range(rounds + 1):
            raw = seconds(lambda: raw_write(folder / "raw", values))
            held = seconds(lambda step=step: checkpointer.save(step, arrays, {}))
            rest = seconds(checkpointer.wait)
            forget(folder)
            read = seconds(lambda: raw_read(folder / "raw"))
            restore = seconds(lambda step=step: jax.block_until_ready(checkpointer.restore(step, arrays)))
            forget(folder)
            half = seconds(lambda step=step: jax.block_until_ready(checkpointer.restore(step, arrays[:1])))
            if step:
                times = (raw, held + rest, held, read, restore, half)
                for name, value in zip(found, times, strict=True):
                    found[name].append(value)
    return sum(value.nbytes for value in values), found


def rows_of(size: int, found: dict[str, list[float]]) -> list[dict[str, object]]:
    times = {name: median(values) for name, values in found.items()}
    ratios = {
        "save": ("raw write / save", times["raw write"] / times["save"]),
        "held up": ("held up / save", times["held up"] / times["save"]),
        "restore": ("raw read / restore", times["raw read"] / times["restore"]),
    }
    rows: list[dict[str, object]] = []
    for name, value in times.items():
        # The raw files and the checkpoints have the same bytes; half of the stages have half of them.
        speed = "" if name == "held up" else size / (2 if name == "restore half" else 1) / value / 1e6
        what, ratio = ratios.get(name, ("", ""))
        rows.append({"action": name, "seconds": value, "MB/s": speed, "ratio": what, "value": ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=384, help="about how much to save")
    parser.add_argument("--rounds", type=int, default=5, help="medians are shown")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder is made in it")
    parser.add_argument("--json", help="file for the line of JSON")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        size, found = measure(folder, options.megabytes, options.rounds)
    finally:
        shutil.rmtree(folder)
    print_results(f"checkpoint of {size / 1e6:.0f} MB", rows_of(size, found), options.json)


if __name__ == "__main__":
    main()
