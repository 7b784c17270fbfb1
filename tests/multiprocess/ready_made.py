"""Ready-made layers that share a variable, trained in this process, one of several perhaps; prints what came out."""

import gc
import json
import weakref
import zlib
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from member import member

import meshpipe
from meshpipe.processes.coordination import barrier
from meshpipe.processes.guard import leave
from meshpipe.sharding import local_value

TOKENS, WIDTH, ROWS = 16, 8, 8
BORROWED = "layers/3/table/embedding"


class Head(nnx.Module):
    """The scores of all tokens, by the table of the embedding."""

    def __init__(self, table: nnx.Embed):
        self.table = table

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table.attend(x)


def make_layers() -> list[nnx.Module]:
    rngs = nnx.Rngs(3)
    table = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
    return [table, *(nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)), Head(table)]


def loss(output: Any, batch: Any) -> Any:
    losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"])
    return losses.sum(), losses.size


def bits(trainer: meshpipe.Trainer) -> dict[str, int]:
    return {path: zlib.crc32(np.asarray(local_value(leaf)).tobytes()) for path, leaf in trainer.params.items()}


def main() -> None:
    member(2, shared=True)
    rng = np.random.default_rng(0)
    batches = [
        {name: rng.integers(0, TOKENS, ROWS).astype(np.int32) for name in ("inputs", "labels")} for _ in range(5)
    ]
    layers = make_layers()
    trainer = meshpipe.Trainer(
        layers,
        loss,
        optax.adam(1e-2),
        batch=batches[0],
        mesh=meshpipe.make_mesh(2),
        pipeline=meshpipe.PipelineConfig(num_microbatches=2),
    )
    held = [weakref.ref(layer) for layer in layers]
    del layers
    gc.collect()
    found: dict[str, Any] = {"released": [reference() is None for reference in held]}
    found["tied"] = trainer.model.tied
    found["losses"] = [float(local_value(trainer.step(batch).loss)).hex() for batch in batches[:3]]
    found["trained"] = bits(trainer)
    # As from a checkpoint that was saved before the two were tied.
    trees = [jax.tree.map(jax.numpy.copy, tree) for tree in trainer.state_tree()]
    for tree in trees:
        if BORROWED in tree["params"]:
            tree["params"][BORROWED] = tree["params"][BORROWED] + 1
    trainer.load_state_tree(trees, 3)
    found["loaded"] = bits(trainer)
    found["losses"] += [float(local_value(trainer.step(batch).loss)).hex() for batch in batches[3:]]
    print("RESULT", json.dumps(found), flush=True)
    if jax.process_count() > 1:
        barrier("end", 60.0)
        leave(0)


if __name__ == "__main__":
    main()
