"""Computes the logits of golden models in this process, one of two perhaps; prints how far they are from the golden.

Arguments: names of golden models, separated by commas; then those of `member`.
"""

import sys

import golden
import numpy as np
import optax
from member import member

import meshpipe
from meshpipe.processes.guard import leave


def main() -> None:
    names = sys.argv.pop(1).split(",")
    member(2, shared=True)
    for name in names:
        config, expected = golden.CONFIGS[name], golden.expected(name)
        ids = np.resize(expected["ids"], (12, 16))
        batch = {"inputs": ids, "targets": ids, "segment_ids": 0 * ids, "weights": np.ones(ids.shape, np.float32)}
        trainer = meshpipe.Trainer(
            golden.modules(name),
            config.loss,
            optax.sgd(0.0),
            batch=batch,
            mesh=meshpipe.make_mesh(2),
            pipeline=meshpipe.PipelineConfig(num_microbatches=2),
            tied=config.tied(),
        )
        logits = np.asarray(trainer.predict(batch))
        error = np.abs(logits - np.resize(expected["logits"], logits.shape)).max()
        print(f"RESULT {name} {logits.shape == (12, 16, 288)} {error:.9f}", flush=True)
    leave(0)


main()
