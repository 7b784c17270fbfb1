"""Trains a small model in this process, which may be one of several, and prints the bits of the results."""

import argparse
import json
import zlib
from collections.abc import Callable
from typing import Any

import meshpipe
from meshpipe.processes.config import DistributedConfig
from meshpipe.processes.guard import leave
from meshpipe.processes.join import join

WIDTH, ROWS, LAYERS = 8, 16, 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mesh", type=int, nargs=3, default=(2, 1, 1))
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--encoder-decoder", action="store_true")
    parser.add_argument("--sown", action="store_true", help="layers add terms to the loss, and state once per step")
    parser.add_argument("--sharding", default="replicated")
    parser.add_argument("--graph", help="a name in graph_models, in place of the chain")
    parser.add_argument("--trainable", nargs="*", help="patterns of the parameters that are trained")
    parser.add_argument("--coordinator")
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--process-count", type=int)
    parser.add_argument("--transfers", default="auto")
    flags = parser.parse_args()
    pipeline, data, tensor = flags.mesh
    meshpipe.use_cpu_devices(pipeline * data * tensor // (flags.process_count or 1))
    place = {name: getattr(flags, name) for name in ("coordinator", "process_id", "process_count", "transfers")}
    join(DistributedConfig(**place))
    kind = "encoder-decoder" if flags.encoder_decoder else "sown" if flags.sown else "chain"
    layout = meshpipe.make_mesh(*flags.mesh), flags.schedule, flags.tied, flags.sharding
    train(*layout, kind, flags.graph, flags.trainable)
    if flags.process_count:
        from meshpipe.processes.coordination import barrier

        barrier("end", 60.0)
        leave(0)


def squares(output: Any, batch: Any) -> Any:
    return ((output - batch["goal"]) ** 2).sum(), output.size


def train(
    mesh: object, schedule: str, tied: bool, sharding: str, kind: str, graph: str | None, trainable: list[str] | None
) -> None:
    import graph_models
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from meshpipe.sharding import PRESETS, local_value

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            kernel_init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", None))
            self.linear = nnx.Linear(WIDTH, WIDTH, kernel_init=kernel_init, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(x + jax.numpy.tanh(self.linear(x)))

    class Sowing(Block):
        def __init__(self, rngs: nnx.Rngs):
            super().__init__(rngs)
            self.seen, self.bias = nnx.Variable(jax.numpy.zeros(WIDTH)), nnx.Variable(jax.numpy.zeros(WIDTH))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.seen[...] += x.sum(0)
            self.sow(meshpipe.LossTerm, "size", 0.1 * (x**2).sum())
            self.sow(nnx.Intermediate, "middle", x.mean())
            return super().__call__(x + self.bias[...])

        def after_step(self) -> None:
            self.bias[...] -= 0.01 * jax.numpy.sign(self.seen[...])
            self.seen[...] = jax.numpy.zeros(WIDTH)

    class Cross(Block):
        def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
            return super().__call__(x) * memory

    layers: dict[str, Any] = {
        "chain": [Block] * LAYERS,
        "sown": [Block, Sowing, Sowing, Block],
        "encoder-decoder": [Block, meshpipe.named("memory", Block), meshpipe.reading("goal", Cross), Cross],
    }
    rng = np.random.default_rng(0)
    batches = [{k: rng.normal(size=(ROWS, WIDTH)).astype(np.float32) for k in ("inputs", "goal")} for _ in range(4)]
    loss: Callable[..., Any] = squares
    if graph is not None:
        model, batches = graph_models.MODELS[graph], graph_models.batches(4)
        layers[kind], loss = model.layers(), model.loss
    trainer = meshpipe.Trainer(
        layers[kind],
        loss,
        optax.adam(1e-2),
        batch=batches[0],
        mesh=mesh,  # type: ignore[arg-type]
        pipeline=meshpipe.PipelineConfig(schedule=schedule, num_microbatches=4),
        clip_norm=0.5,
        rules=PRESETS[sharding],
        tied=[("layers/0/linear/kernel", "layers/3/linear/kernel")] if tied else (),
        trainable=trainable,
    )
    scalars = []
    for batch in batches[:3]:
        result = trainer.step(batch)
        trainer.check(result)
        values = (result.loss, result.grad_norm, *result.terms.values(), *result.metrics.values())
        scalars.append([float(local_value(value)).hex() for value in values])
    bits = {
        f"{path} {shard.index}": zlib.crc32(np.asarray(shard.data).tobytes())
        for path, leaf in {**trainer.params, **trainer.state}.items()
        for shard in leaf.addressable_shards
    }
    found = {"scalars": scalars, "held out": trainer.evaluate(batches[3:]), "parameters": bits}
    traced = sorted(trainer.model.traced)
    print("RESULT", json.dumps({**found, "stages": traced, "rows": len(trainer.model.rows_read())}), flush=True)


if __name__ == "__main__":
    main()
