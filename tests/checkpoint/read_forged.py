"""Forges documents of the checkpoint RUN/STEP, one after the other, and tells how every reader of it ends.

`read_forged.py RUN STEP FIRST LAST` prints a line of JSON for each number from FIRST below LAST. A reader that takes
too long ends the program with its traceback.
"""

import contextlib
import faulthandler
import io
import json
import random
import resource
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import meshpipe

meshpipe.use_cpu_devices(2)

import jax
import numpy as np
import tiny_recipes
from damage import remake_checksums
from forgeries import forge

from meshpipe.checkpoint import CheckpointConfig, Checkpointer, CheckpointError
from meshpipe.cli.main import main
from meshpipe.processes.exit_reporter import saved_sentence
from meshpipe.runs.find_start import find_start

SECONDS = 30
"""For one forgery."""


def read(run: Path, step: int, expected: dict[str, np.ndarray]) -> dict:
    """How each reader ends: the exit code and what it says, or the error."""
    found: dict = {}
    for name, arguments in {"list": [], "show": ["--step", str(step)], "verify": []}.items():
        output, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            code = main(["checkpoint", name, str(run), *arguments])
        found[name] = code, error.getvalue() + (output.getvalue() if name == "verify" else "")
    wanted = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in expected.items()}
    sections: dict[str, dict] = {}
    for key, shape in wanted.items():
        section, _, path = key.partition("/")
        sections.setdefault(section, {})[path] = shape
    try:
        [tree] = Checkpointer(run).restore(step, [sections])
        same = all(
            np.asarray(tree[s][p]).tobytes() == expected[f"{s}/{p}"].tobytes() for s in sections for p in sections[s]
        )
        found["restore"] = 0, "" if same else "other values"
    except CheckpointError as error:
        found["restore"] = 2, str(error)
    options = CheckpointConfig(checkpoint_dir=str(run), resume=True)
    try:
        saved = find_start(replace(tiny_recipes.single(), checkpoint=options))
        assert saved is not None
        shapes = [{name: sections.get(name, {}) for name in ("params", "state", "optimizer")}]
        [tree] = saved.read(shapes).trees
        same = saved.step == step and all(
            np.asarray(tree[s][p]).tobytes() == expected[f"{s}/{p}"].tobytes() for s in sections for p in sections[s]
        )
        found["resume"] = 0, "" if same else "other values"
    except ValueError as error:
        found["resume"] = 2, str(error)
    found["last words"] = 0, saved_sentence(str(run))
    return found


def leaves_of(run: Path, step: int) -> dict[str, np.ndarray]:
    reader = Checkpointer(run)
    wanted = {key: jax.ShapeDtypeStruct(v["shape"], v["dtype"]) for key, v in reader.leaves(step).items()}
    tree = {}
    for key, shape in wanted.items():
        section, _, path = key.partition("/")
        tree.setdefault(section, {})[path] = shape
    [found] = reader.restore(step, [tree])
    return {f"{section}/{path}": np.asarray(v) for section, part in found.items() for path, v in part.items()}


def run_all(run: Path, step: int, first: int, last: int) -> None:
    expected = leaves_of(run, step)
    documents = [p for p in sorted((run / str(step)).rglob("*")) if p.is_file()]
    documents = [p for p in documents if p.name in ("checksums.json", "metadata", ".zarray", "_METADATA")]
    often = [p for p in documents if p.name in ("checksums.json", "metadata")]
    for number in range(first, last):
        chance = random.Random(number)
        path = chance.choice(documents if number % 3 else often).relative_to(run)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "run"
            shutil.copytree(run, copy)
            forged = forge((copy / path).read_bytes(), chance)
            (copy / path).write_bytes(forged)
            if path.name == "checksums.json":
                chance.random() < 0.5 and right_crc(copy / path)
            else:
                remake_checksums(copy / str(step))
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            found = read(copy, step, expected)
            faulthandler.cancel_dump_traceback_later()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        what = {"number": number, "file": str(path), "forged": forged[:300].decode(errors="replace"), "kB": memory}
        print(json.dumps({**what, "found": found}), flush=True)


def right_crc(path: Path) -> None:
    """Forges the list's checksum of itself too, where it still is a list."""
    import zlib

    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        document = json.loads(path.read_bytes())
        document["crc32"] = zlib.crc32(json.dumps(document["files"], sort_keys=True).encode())
        path.write_text(json.dumps(document))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), *map(int, sys.argv[2:]))
