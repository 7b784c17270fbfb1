"""A step that is not finite is left out, and the first value that went wrong is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import NonFiniteError, PipelineConfig, Trainer, make_mesh


@jax.custom_vjp
def explode(x, trigger):
    """The identity, whose gradient overflows where `trigger` is set."""
    return x


explode.defvjp(lambda x, trigger: (x, trigger), lambda trigger, g: (jnp.where(trigger > 0, jnp.inf, 1.0) * g, None))


class Fragile(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array, bad_forward: jax.Array, bad_backward: jax.Array) -> jax.Array:
        x = self.norm(self.linear(x)) + jnp.where(bad_forward, jnp.nan, 0.0)[:, None]
        return explode(x, bad_backward.sum())


def dense(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(4, 4, rngs=rngs)


def loss(output, batch):
    return ((output**2).mean(-1) * batch["weight"]).sum(), batch["weight"].sum()


def batch(**changes):
    fields = {
        "inputs": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32),
        "bad_forward": np.zeros(8, np.int32),
        "bad_backward": np.zeros(8, np.int32),
        "weight": np.ones(8, np.float32),
    }
    for name, (index, value) in changes.items():
        fields[name][index] = value
    return fields


@pytest.fixture(scope="module")
def trainer():
    return Trainer(
        [dense, dense, Fragile, dense],
        loss,
        optax.adam(1e-2),
        batch=batch(),
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=4),
    )


def everything(trainer):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trainer.state_tree())]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": (3, np.nan)}, r"batch field 'inputs' is not finite in microbatch 1"),
        ({"bad_forward": (5, 1)}, r"the output of layers/2 \(stage 1\) is not finite in microbatch 2"),
        ({"bad_backward": (6, 1)}, r"the gradient of .*layers/2.*\(stage 1\) is not.* in microbatch 3"),
        ({"weight": (slice(None), 0.0)}, r"the weight of the loss is 0 over the whole batch"),
        ({"inputs": (0, 1e30)}, r"not finite"),
    ],
    ids=["batch", "forward", "backward", "weight", "overflow"],
)
def test_the_first_bad_value_is_named_and_nothing_changes(trainer, changes, message):
    trainer.check(trainer.step(batch()))
    good, number = everything(trainer), trainer.step_number
    result = trainer.step(batch(**changes))
    trainer.step(batch())  # already dispatched when the first is looked at
    with pytest.raises(NonFiniteError, match=f"Step {number + 1} is not finite: .*{message}"):
        trainer.check(result)
    assert everything(trainer) == good
    assert trainer.step_number == number
    trainer.check(trainer.step(batch()))  # and training goes on
    assert everything(trainer) != good


def test_an_update_that_overflows_is_told():
    trainer = Trainer([dense, dense], loss, optax.sgd(1e38), batch=batch(), mesh=make_mesh(2))
    result = trainer.step({**batch(), "inputs": 30 * batch()["inputs"]})
    with pytest.raises(NonFiniteError, match=r"Step 1 has a finite loss .* parameters of stage \d not finite"):
        trainer.check(result)


def test_a_parameter_that_is_not_finite_is_named(trainer):
    trees = trainer.state_tree()
    spoiled = [{section: dict(leaves) for section, leaves in tree.items()} for tree in trees]
    kernel = spoiled[1]["params"]["layers/3/kernel"]
    spoiled[1]["params"]["layers/3/kernel"] = jax.device_put(np.asarray(kernel) * np.nan, kernel.sharding)
    trainer.load_state_tree(spoiled, 7)
    with pytest.raises(NonFiniteError, match=r"Step 8 .*parameter layers/3/kernel already is not finite"):
        trainer.check(trainer.step(batch()))
