"""Trains, predicts, evaluates and takes modules in this process, one of several perhaps; prints what came out."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import small_model
from flax import nnx
from member import member

import meshpipe
from meshpipe.processes.coordination import barrier
from meshpipe.processes.guard import leave

LAYERS = small_model.LAYERS


def bits(value: Any) -> int:
    return zlib.crc32(np.ascontiguousarray(value).tobytes())


def leaves(index: int, module: nnx.Module) -> dict[str, int]:
    flat = nnx.to_flat_state(nnx.state(module))
    named = {"/".join(map(str, ("layers", index, *key))): v for key, v in flat if not isinstance(v, nnx.RngState)}
    return {path: bits(v.get_value()) for path, v in named.items()}


def main() -> None:
    member(4, shared=True)
    batches = small_model.batches(3)
    trainer = meshpipe.Trainer(
        LAYERS,
        small_model.loss,
        optax.adam(1e-2),
        batch=batches[0],
        mesh=meshpipe.make_mesh(2, 2),
        pipeline=meshpipe.PipelineConfig(num_microbatches=2),
        rules=meshpipe.ShardingRules({"hidden": "data", "embed": None}, gathered=frozenset(["hidden"])),
    )
    for batch in batches:
        trainer.step(batch)
    found: dict[str, Any] = {}
    whole = {name: value for name, value in batches[0].items() if name in ("inputs", "shift")}
    odd = {name: value[:7] for name, value in whole.items()}
    outputs = [*trainer.predict([whole, odd]), trainer.predict(whole)]
    found["rows"] = [len(output) for output in outputs]
    found["outputs"] = [bits(output) for output in outputs]
    rest = {name: value[:13] for name, value in batches[1].items()}
    found["evaluated"] = trainer.evaluate([batches[0], rest])["loss"].hex()
    modules = trainer.modules()
    found["modules"] = {i: leaves(i, module) for i, module in enumerate(modules) if module is not None}
    with nnx.use_eager_sharding(False):
        given = [layer(rngs=nnx.Rngs(5)) for layer in LAYERS]
    trainer.update(given)
    found["updated"] = {i: leaves(i, given[i]) for i in map(int, found["modules"])}
    with meshpipe.Checkpointer(Path("run")) as checkpointer:
        checkpointer.save(3, trainer.state_tree(), {}, trainer.abstract_state_tree())
    if jax.process_count() > 1:
        barrier("saved", 60.0)
    found["loaded"] = {i: leaves(i, module) for i, module in enumerate(meshpipe.load(Path("run"), layers=LAYERS))}
    print("RESULT", json.dumps(found), flush=True)
    if jax.process_count() > 1:
        barrier("end", 60.0)
        leave(0)


if __name__ == "__main__":
    main()
