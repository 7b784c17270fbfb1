"""Seconds from the start of a process to the end of its first step, for 2 and for 8 equal stages.

Every stage has the same transformer blocks, and each run is a process of its own on virtual CPU devices. Runs without a
cache of compiled programs and with one that an earlier run has filled take turns.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark import median, print_results

ROOT = Path(__file__).resolve().parents[2]
STAGES = (2, 8)
PARTS = ("import", "compile", "first step", "all")
BLOCKS, WIDTH, HEADS, SEQUENCE, BATCH, MICROBATCHES = 2, 256, 8, 64, 16, 8


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
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

        def __call__(self, x):
            x = x + self.dropout(self.attention(self.norm1(x)))
            return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))

    imported = time.time()
    batch = {"inputs": np.random.default_rng(0).normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32)}
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


def run(stages: int, cache: str | None) -> dict[str, float]:
    command = [sys.executable, __file__, "--stages", str(stages), "--started", str(time.time())]
    output = subprocess.run(
        command + (["--cache", cache] if cache else []), check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    return dict(json.loads(output.splitlines()[-1]))


def measure(repeats: int) -> list[dict[str, object]]:
    found: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for stages in STAGES:
            run(stages, f"{folder}/{stages}")
        for _ in range(repeats):
            for stages in STAGES:
                for kind, cache in (("cold", None), ("warm", f"{folder}/{stages}")):
                    found.setdefault((stages, kind), []).append(run(stages, cache))
    rows: dict[tuple[int, str], dict[str, object]] = {}
    for (stages, kind), runs in found.items():
        rows[stages, kind] = {"stages": stages, "cache": kind} | {part: median(r[part] for r in runs) for part in PARTS}

    def ratio(
        stages: object, kind: str, over: tuple[int, str], under: tuple[int, str], target: str
    ) -> dict[str, object]:
        quotients = {part: float(rows[over][part]) / float(rows[under][part]) for part in PARTS}  # type: ignore[arg-type]
        return {"stages": stages, "cache": kind, **quotients, "target": target}

    few, many = STAGES
    return [
        *rows.values(),
        ratio(f"{many} / {few}", "cold", (many, "cold"), (few, "cold"), "all <= 1.5"),
        *(ratio(n, "cold / warm", (n, "cold"), (n, "warm"), "compile >= 3") for n in STAGES),
    ]


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
