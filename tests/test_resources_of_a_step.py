"""What a step costs: each layer is traced once, parameters are never copied, activations stay within the promise."""

import gc
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.plan.plan import Op

WIDTH, HIDDEN, ROWS = 4, 12, 2
SHAPES = {(WIDTH, HIDDEN), (HIDDEN, WIDTH), (ROWS, HIDDEN)}
"""Of kernels, and of what is kept for backward."""
CALLS: Counter[int] = Counter()


class Block(nnx.Module):
    """Keeps activations of shape (ROWS, HIDDEN) for backward, a shape that nothing else has."""

    def __init__(self, number: int, rngs: nnx.Rngs):
        self.number = number
        self.up = nnx.Linear(WIDTH, HIDDEN, dtype=jnp.bfloat16, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        CALLS[self.number] += 1
        return x + self.down(jnp.tanh(self.up(x))).astype(x.dtype)


def layers():
    return [lambda rngs, number=number: Block(number, rngs=rngs) for number in range(4)]


def loss(output, batch):
    return (output**2).sum(), jnp.float32(output.size)


def trainer(num_microbatches, **pipeline):
    batch = {"inputs": np.ones((ROWS * num_microbatches, WIDTH), np.float32)}
    made = Trainer(
        layers(),
        loss,
        optax.sgd(0.1, momentum=0.9),
        batch=batch,
        mesh=make_mesh(4),
        pipeline=PipelineConfig(num_microbatches=num_microbatches, **pipeline),
    )
    return made, batch


def live_after_every_instruction(made, batch):
    """For each instruction of one step, the live arrays of each device by shape, of the shapes of interest."""
    made.step(batch)
    executor = made.model.executor
    seen = []

    def watch(step):
        def run(slots):
            step(slots)
            jax.block_until_ready([leaf for slot in slots for leaf in jax.tree.leaves(slot)])
            counts = Counter()
            for array in jax.live_arrays():
                if array.shape in SHAPES:
                    counts[next(iter(array.devices())).id, array.shape, array.dtype.name] += 1
            seen.append(counts)

        return run

    plain, executor._steps = executor._steps, [watch(step) for step in executor._steps]
    gc.collect()
    made.step(batch)
    executor._steps = plain
    return seen


def test_every_layer_is_traced_once():
    CALLS.clear()
    made, batch = trainer(2, remat="full")
    made.step(batch)
    made.step(batch)
    assert dict(CALLS) == {0: 1, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_memory_of_a_step(schedule):
    num_microbatches = 6
    made, batch = trainer(num_microbatches, schedule=schedule)
    gc.collect()
    before = Counter((a.shape, a.dtype.name) for a in jax.live_arrays())
    seen = live_after_every_instruction(made, batch)
    devices = [mesh.devices.flat[0].id for mesh in made.model._meshes]

    for stage, device in enumerate(devices):
        # Parameters, momentum, one accumulator each; the bfloat16 copies are made once, not for every microbatch.
        for shape in ((WIDTH, HIDDEN), (HIDDEN, WIDTH)):
            assert max(counts[device, shape, "float32"] for counts in seen) == 3
            assert max(counts[device, shape, "bfloat16"] for counts in seen) == 1
        promised = num_microbatches if schedule == "gpipe" else min(num_microbatches, 4 - stage)
        assert made.plan.peak_activations[stage] == promised
        each = sum(v.aval.shape == (ROWS, HIDDEN) for v in made.model.traced[stage].residual_vars)
        assert each > 0
        kept = [sum(n for key, n in counts.items() if key[:2] == (device, (ROWS, HIDDEN))) for counts in seen]
        assert max(kept) == promised * each

    del seen
    gc.collect()
    after = Counter((a.shape, a.dtype.name) for a in jax.live_arrays())
    assert after - before == Counter()


def test_full_remat_keeps_only_stage_inputs():
    made, batch = trainer(4, remat="full", schedule="gpipe")
    seen = live_after_every_instruction(made, batch)
    forwards = sum(action.op is Op.FORWARD for action in made.plan.actions)
    assert forwards == 16
    for counts in seen:
        assert not any(shape == (ROWS, HIDDEN) for _, shape, _ in counts)


def test_a_stage_receives_only_the_batch_fields_that_it_reads():
    batch = {"inputs": np.ones((4, WIDTH), np.float32), "target": np.ones((4, WIDTH), np.float32)}
    made = Trainer(
        layers(),
        lambda output, fields: (((output - fields["target"]) ** 2).sum(), jnp.float32(output.size)),
        optax.sgd(0.1),
        batch=batch,
        mesh=make_mesh(4),
        pipeline=PipelineConfig(num_microbatches=2),
    )
    assert [stage.input_names for stage in made.model.traced.values()] == [("inputs",), (), (), ("target",)]
