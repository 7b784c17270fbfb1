"""Two trainers at once in this process, which may be one of several: their steps overlap, and both are evaluated."""

import json

import jax
import numpy as np
import optax
from flax import nnx
from member import member

import meshpipe
from meshpipe.processes.coordination import barrier
from meshpipe.processes.guard import leave
from meshpipe.sharding import local_value

WIDTH, ROWS = 8, 8


def make(seed: int) -> meshpipe.Trainer:
    return meshpipe.Trainer(
        [lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)] * 2,
        lambda output, batch: ((output**2).sum(), output.size),
        optax.sgd(0.1),
        batch={"inputs": np.ones((ROWS, WIDTH), np.float32)},
        mesh=meshpipe.make_mesh(2),
        pipeline=meshpipe.PipelineConfig(num_microbatches=2),
        seed=seed,
    )


def keys(meeting: str) -> int:
    """The number of keys at the coordinator when all processes are here."""
    if jax.process_count() == 1:
        return 0
    from jax._src import distributed

    barrier(meeting, 60.0)
    count = len(distributed.global_state.client.key_value_dir_get("meshpipe"))
    barrier(f"{meeting} counted", 60.0)
    return count


def main() -> None:
    member(2, shared=True)
    batch = {"inputs": np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)}
    first, second = make(0), make(1)
    found: dict[str, object] = {
        "held out": [trainer.evaluate([batch])["loss"].hex() for trainer in (first, second)],
        "loss": [float(trainer.loss_and_gradients(batch)[0]).hex() for trainer in (first, second)],
    }
    steps = [trainer.step(batch) for _ in range(3) for trainer in (first, second)]
    found["steps"] = [float(local_value(result.loss)).hex() for result in steps]
    before = keys("before")
    for _ in range(5):
        first.evaluate([batch])
    found["new keys"] = keys("after") - before
    print("RESULT", json.dumps(found), flush=True)
    if jax.process_count() > 1:
        leave(0)


if __name__ == "__main__":
    main()
