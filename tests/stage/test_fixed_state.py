"""State that forward leaves as it is, such as frozen weights, tables and masks, is neither copied nor kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.stage.jaxpr import variables

WIDTH, MICROBATCHES = 16, 4
BATCH = {"inputs": np.random.default_rng(0).normal(size=(2 * MICROBATCHES, WIDTH)).astype(np.float32)}


class Frozen(nnx.Variable):
    pass


class Adapted(nnx.Module):
    """A matrix, frozen or trained, in bfloat16, with batch statistics, dropout and a little that is trained."""

    def __init__(self, kind: type[nnx.Variable], rngs: nnx.Rngs):
        self.base = kind(0.3 * rngs.params.normal((WIDTH, WIDTH)))
        self.mask = nnx.Variable(jnp.arange(WIDTH) % 3 > 0)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(WIDTH))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.bfloat16) @ self.base[...].astype(jnp.bfloat16)
        return jnp.where(self.mask[...], x, self.norm(jnp.tanh(y.astype(x.dtype)) + self.bias[...]))


def loss(output: jax.Array, batch: Any) -> Any:
    return (output**2).sum(), output.size


def trainer(kind: type[nnx.Variable], **pipeline: Any) -> Trainer:
    config = PipelineConfig(**{"num_microbatches": MICROBATCHES, "schedule": "gpipe"} | pipeline)

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return Adapted(kind, rngs)

    return Trainer([make] * 2, loss, optax.sgd(0.1), batch=BATCH, mesh=make_mesh(2), pipeline=config)


@pytest.mark.parametrize("remat", ["none", "full", "nothing_saveable"])
def test_fixed_state_is_no_output_and_no_residual(remat: str) -> None:
    made = trainer(Frozen, remat=remat)
    stage = made.model.traced[0]
    assert sorted(stage.fixed_paths) == ["layers/0/base", "layers/0/mask"]
    assert [shape.shape for shape in stage.state] == [(WIDTH,)] * 2  # the statistics
    forward = stage.forward(outputs=True, residuals=True).jaxpr
    assert not set(variables(forward.outvars)) & set(forward.invars)
    # The cast is made once per step; no microbatch has a matrix of its own.
    assert [v.aval.shape for v in stage.prepared_vars] == [(WIDTH, WIDTH)]
    assert not any(v.aval.shape == (WIDTH, WIDTH) for e in forward.eqns for v in e.outvars)
    assert not any(v.aval.shape == (WIDTH, WIDTH) for v in stage.residual_vars)
    assert len(stage.kept_state) == 0

    before = made.state
    made.step(BATCH)
    made.step(BATCH)
    after = made.state
    assert {path for path in after if after[path] is before[path]} == {
        f"layers/{i}/{name}" for i in (0, 1) for name in ("base", "mask")
    }
    assert (np.asarray(after["layers/1/norm/mean"]) != 0).all()


def test_in_evaluation_batch_statistics_are_fixed_too() -> None:
    made = trainer(Frozen)
    made.evaluate([BATCH])
    traced = made.model.evaluation.traced
    assert traced is not None
    assert [stage.changing for stage in traced.values()] == [(), ()]
    assert all(not stage.new_state_vars for stage in traced.values())


def test_a_frozen_matrix_gives_what_an_untrained_parameter_gives() -> None:
    frozen, trained = trainer(Frozen), trainer(nnx.Param)
    (loss_frozen, gradients), (loss_trained, all_gradients) = (t.loss_and_gradients(BATCH) for t in (frozen, trained))
    assert float(loss_frozen) == float(loss_trained)
    assert len(gradients) + 2 == len(all_gradients)
    for path, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, all_gradients[path])


def test_a_step_holds_one_copy() -> None:
    """As many matrices as stages, and their bfloat16, however many microbatches are alive."""
    made = trainer(Frozen)
    made.step(BATCH)
    most = {"float32": 0, "bfloat16": 0}

    def observe(*_: Any) -> None:
        for name in most:
            live = [a for a in jax.live_arrays() if a.shape == (WIDTH, WIDTH) and a.dtype.name == name]
            most[name] = max(most[name], len(live))

    made.step(BATCH, observe=observe)
    assert most == {"float32": 2, "bfloat16": 2}
