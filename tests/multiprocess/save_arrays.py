"""One of two processes of two devices each, which save arrays together, also when one of them fails."""

import json
import os
import signal
import time
from pathlib import Path

from member import join_run, place_parser

from meshpipe.processes.guard import leave


def main() -> None:
    parser = place_parser()
    parser.add_argument("--kill", action="store_true")
    flags = join_run(parser.parse_args(), 2)
    (killed if flags.kill else run)(Path("run"))
    leave(0)


def arrays(offset: float) -> tuple[list, list]:
    """Trees of two stages, the first across both processes, the second on the devices of process 1; their shapes."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    everywhere = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
    second = Mesh(np.array(jax.devices()[2:]), ("b",))
    values = np.arange(64, dtype=np.float32).reshape(8, 8) + offset
    places = [
        {
            "split": (everywhere, ("a", "b"), values),
            "replicated": (everywhere, (None, "b"), values + 1),
            "count": (everywhere, (), values[0, 0]),
        },
        {
            "own": (second, ("b",), values + 2),
            "moment": (second, (None, "b"), values + 3),
            "count": (second, (), values[0, 0]),
            "empty": (second, (), values[:0]),
        },
    ]
    shapes: list = []
    trees: list = []
    for leaves in places:
        placed = {name: (NamedSharding(mesh, PartitionSpec(*s)), value) for name, (mesh, s, value) in leaves.items()}
        shape = {n: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding) for n, (sharding, v) in placed.items()}
        local = {
            n: jax.make_array_from_callback(v.shape, sharding, lambda index, v=v: v[index])
            for n, (sharding, v) in placed.items()
            if sharding.addressable_devices
        }
        shapes.append({"params": shape})
        trees.append({"params": local})
    return trees, shapes


def run(folder: Path) -> None:
    import numpy as np

    from meshpipe.checkpoint import (
        Checkpointer,
        CheckpointError,
        CheckpointWriteError,
        checksums,
        together,
        verify_checkpoint,
    )
    from meshpipe.processes.coordination import barrier, process_index

    me = process_index()
    found: dict = {}

    def fails(checkpointer: Checkpointer, step: int) -> str:
        trees, shapes = arrays(step)
        checkpointer.save(step, trees, {}, shapes)
        try:
            checkpointer.wait()
        except CheckpointWriteError as error:
            return str(error)
        raise AssertionError("the save did not fail")

    checkpointer = Checkpointer(folder)
    trees, shapes = arrays(0)
    try:  # an error in one process is reported to all
        checkpointer.prepare(shapes, {"only here": {1, 2}} if me == 1 else {})
    except CheckpointError as error:
        found["unprepared"] = str(error)
    checkpointer.prepare(shapes, {"seed": 7})
    checkpointer.save(1, trees, {"seed": 7}, shapes)
    checkpointer.wait()
    assert checkpointer.steps() == [1]
    assert verify_checkpoint(folder, 1) == []

    read: list[str] = []
    original = checksums.read_checked
    checksums.read_checked = lambda path, *rest: (
        read.append(str(path.relative_to(folder.absolute() / "1"))),
        original(path, *rest),
    )[1]
    restored = checkpointer.restore(1, shapes)
    checksums.read_checked = original
    found["read"] = sorted(name for name in read if name.startswith("stage_") and name[-1].isdigit())
    for tree, expected in zip(restored, trees, strict=True):
        assert tree["params"].keys() == expected["params"].keys()
        for name, leaf in expected["params"].items():
            assert leaf.sharding == tree["params"][name].sharding
            for a, b in zip(leaf.addressable_shards, tree["params"][name].addressable_shards, strict=True):
                np.testing.assert_array_equal(a.data, b.data)

    write = together.write_files

    def broken(*arguments: object) -> None:
        raise OSError("no space left")

    if me == 1:
        together.write_files = broken
    found["failed"] = fails(checkpointer, 2)
    together.write_files = write

    given_up = Path("given up")

    def slow(*arguments: object) -> object:
        while not given_up.exists():
            time.sleep(0.01)
        return write(*arguments)

    if me == 1:
        together.write_files = slow
    with Checkpointer(folder, wait_seconds=240 if me == 1 else 0.5) as impatient:
        found["slow"] = fails(impatient, 3)
    given_up.touch()
    together.write_files = write
    found["not shared"] = fails(Checkpointer(f"only-{me}"), 4)
    barrier("failed", 240)
    assert checkpointer.steps() == [1]
    trees, shapes = arrays(5)
    checkpointer.save(5, trees, {}, shapes)
    checkpointer.close()
    assert checkpointer.steps() == [1, 5]
    assert verify_checkpoint(folder, 5) == []
    print("RESULT", json.dumps(found), flush=True)
    barrier("end", 240)


def killed(folder: Path) -> None:
    from meshpipe.checkpoint import Checkpointer, CheckpointWriteError, together
    from meshpipe.processes.coordination import process_index

    checkpointer = Checkpointer(folder, wait_seconds=3)
    trees, shapes = arrays(0)
    checkpointer.save(1, trees, {}, shapes)
    checkpointer.wait()
    write = together.write_files

    def dies(partial: Path, contents: dict) -> None:
        write(partial, dict(list(contents.items())[:2]))
        os.kill(os.getpid(), signal.SIGKILL)

    if process_index() == 1:
        together.write_files = dies
    checkpointer.save(2, trees, {}, shapes)
    try:
        checkpointer.wait()
    except CheckpointWriteError as error:
        print("RESULT", json.dumps({"failed": str(error)}), flush=True)


if __name__ == "__main__":
    main()
