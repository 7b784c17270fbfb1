"""A user's own loop, without `Guard`, in which the processes take different numbers of steps."""

import jax
import numpy as np
import optax
from flax import nnx
from member import place_parser

import meshpipe
from meshpipe.sharding import local_value


def main() -> None:
    parser = place_parser()
    parser.add_argument("--steps", type=int)
    flags = parser.parse_args()
    meshpipe.use_cpu_devices(1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(flags.coordinator, flags.process_count, flags.process_id)
    batch = {"inputs": np.ones((8, 8), np.float32)}
    trainer = meshpipe.Trainer(
        [lambda rngs: nnx.Linear(8, 8, rngs=rngs)] * 2,
        lambda output, batch: ((output**2).sum(), output.size),
        optax.sgd(0.1),
        batch=batch,
        mesh=meshpipe.make_mesh(2),
    )
    for _ in range(flags.steps):
        print("loss", float(local_value(trainer.step(batch).loss)), flush=True)


if __name__ == "__main__":
    main()
