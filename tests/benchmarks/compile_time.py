"""Seconds from the start of a process to the end of its first step, for 2 and for 8 equal stages.

Every stage has the same transformer blocks, each run is a process of its own on virtual CPU devices, and the runs of
all kinds take turns: without a cache, with one that an earlier run has filled, and with JAX's own persistent cache
alone, filled likewise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark import median, print_results

ROOT = Path(__file__).resolve().parents[2]
STAGES = (2, 8)
BLOCKS, WIDTH, HEADS, SEQUENCE, BATCH, MICROBATCHES = 2, 256, 8, 32, 16, 4


def run_once(stages: int, cache: str | None, started: float) -> dict[str, float]:
    """Imports, builds and steps; seconds of each, and in all since `started`."""
    sys.path.insert(0, str(ROOT))
    import meshpipe

    meshpipe.use_cpu_devices(stages)
    import numpy as np
    import optax
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.down(nnx.gelu(self.up(self.norm2(x))))

    imported = time.time()
    batch = {"inputs": np.random.default_rng(0).normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32)}
    meshpipe.host.keep_freed_memory()
    with meshpipe.host.no_garbage_collection():  # as the command does
        trainer = meshpipe.Trainer(
            [Block] * (BLOCKS * stages),
            lambda output, batch: (((output - batch["inputs"]) ** 2).sum(), output.size),
            optax.adamw(1e-3),
            batch=batch,
            mesh=meshpipe.make_mesh(stages),
            pipeline=meshpipe.PipelineConfig(num_microbatches=MICROBATCHES),
            compile_cache=cache,
        )
    compiled = time.time()
    trainer.check(trainer.step(batch))
    done = time.time()
    return {
        "import": imported - started,
        "compile": compiled - imported,
        "first step": done - compiled,
        "all": done - started,
    }


def run(stages: int, cache: str | None, of_jax: str | None = None) -> dict[str, float]:
    environment = os.environ if of_jax is None else os.environ | settings_of_jax(of_jax)
    command = [sys.executable, __file__, "--stages", str(stages), "--started", str(time.time())]
    command += ["--cache", cache] if cache else []
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def settings_of_jax(folder: str) -> dict[str, str]:
    """JAX's own cache in this folder, for every program. A file in place of the subfolder keeps ours out of it."""
    path = Path(folder)
    path.mkdir(exist_ok=True)
    (path / "meshpipe").touch()
    return {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def measure(repeats: int) -> list[dict[str, object]]:
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stages in STAGES:
            run(stages, f"{folder}/{stages}")
            run(stages, None, f"{folder}/jax {stages}")
        for _ in range(repeats):
            for stages in STAGES:
                for kind, cache, of_jax in (
                    ("cold", None, None),
                    ("warm", f"{folder}/{stages}", None),
                    ("JAX's", None, f"{folder}/jax {stages}"),
                ):
                    found.setdefault((stages, kind), []).append(run(stages, cache, of_jax))
    seconds = {key: {part: median(r[part] for r in runs) for part in runs[0]} for key, runs in found.items()}
    rows: list[dict[str, object]] = [{"stages": s, "cache": k, **values} for (s, k), values in seconds.items()]

    def ratio(what: str, part: str, over: tuple[int, str], under: tuple[int, str], target: str) -> dict[str, object]:
        return {"ratio": f"{what}: {part}", "value": seconds[over][part] / seconds[under][part], "target": target}

    few, many = STAGES
    for part, is_target in (("all", True), ("compile", False)):
        rows.append(ratio(f"{many} stages / {few}", part, (many, "cold"), (few, "cold"), "<= 1.5" if is_target else ""))
    for stages in STAGES:
        for part, target in (("all", ""), ("compile", ">= 3")):
            rows.append(ratio(f"{stages} stages, cold / warm", part, (stages, "cold"), (stages, "warm"), target))
            rows.append(ratio(f"{stages} stages, cold / JAX's cache", part, (stages, "cold"), (stages, "JAX's"), ""))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; medians are shown")
    parser.add_argument("--json", help="file for the line of JSON")
    parser.add_argument("--stages", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages is not None:
        print(json.dumps(run_once(options.stages, options.cache, options.started)))
    else:
        print_results("compile time", measure(options.repeats), options.json)


if __name__ == "__main__":
    main()
