"""Creates pairs of trainers in two processes that differ in one argument, and prints each process's error."""

import json
from typing import Any

import numpy as np
import optax
from flax import nnx
from member import member

import meshpipe
from meshpipe.processes.coordination import barrier
from meshpipe.processes.guard import leave

WIDTH, ROWS = 8, 8


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs)


def squares(output: Any, batch: Any) -> Any:
    return (output**2).sum(), output.size


def magnitudes(output: Any, batch: Any) -> Any:
    return abs(output).sum(), output.size


class Relu(nnx.Module):
    def __call__(self, x: Any) -> Any:
        return nnx.relu(x)


class Gelu(nnx.Module):
    def __call__(self, x: Any) -> Any:
        return nnx.gelu(x)


def other_weights() -> list[nnx.Module]:
    return [linear(nnx.Rngs(1)), linear(nnx.Rngs(0))]


def failing(rngs: nnx.Rngs) -> nnx.Module:
    raise OSError("no such vocabulary")


def different() -> dict[str, dict[str, Any]]:
    """Arguments of process 1 that replace the usual ones."""
    return {
        "learning rate": {"optimizer": optax.sgd(0.2)},
        "schedule of rates": {"optimizer": optax.sgd(optax.linear_schedule(0.1, 0.0, 10))},
        "clipping": {"clip_norm": 1.0},
        "seed": {"seed": 1},
        "microbatches": {"pipeline": meshpipe.PipelineConfig(num_microbatches=4)},
        "schedule": {"pipeline": meshpipe.PipelineConfig(num_microbatches=2, schedule="gpipe")},
        "loss": {"loss": magnitudes},
        "number of layers": {"layers": [linear] * 3},
        "layers": {"layers": [linear, lambda rngs: nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)]},
        "ready-made weights": {"layers": other_weights()},
        "tied": {"tied": [("layers/0/kernel", "layers/1/kernel")]},
        "failure": {"layers": [failing] * 2},
    }


def same() -> dict[str, dict[str, Any]]:
    """Arguments of process 0 that replace the usual ones."""
    return {"ready-made weights": {"layers": other_weights()[::-1]}}


def make(**other: Any) -> meshpipe.Trainer:
    arguments: dict[str, Any] = {
        "layers": [linear] * 2,
        "loss": squares,
        "optimizer": optax.sgd(0.1),
        "batch": {"inputs": np.ones((ROWS, WIDTH), np.float32)},
        "mesh": meshpipe.make_mesh(2),
        "pipeline": meshpipe.PipelineConfig(num_microbatches=2),
    }
    return meshpipe.Trainer(**(arguments | other))


def main() -> None:
    flags = member(1)
    heard = {}
    for name, other in different().items():
        try:
            make(**(other if flags.process_id else same().get(name, {})))
            heard[name] = "nothing"
        except (ValueError, OSError) as error:
            heard[name] = str(error)
    make().step({"inputs": np.ones((ROWS, WIDTH), np.float32)})  # and now they agree
    print("RESULT", json.dumps(heard), flush=True)
    barrier("end", 60.0)
    leave(0)


if __name__ == "__main__":
    main()
