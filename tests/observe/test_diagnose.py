"""A step that is not finite is left out, and the first value that went wrong is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import LossTerm, NonFiniteError, PipelineConfig, Trainer, make_mesh


@jax.custom_vjp
def explode(x, trigger):
    """The identity, whose gradient overflows where `trigger` is set."""
    return x


explode.defvjp(lambda x, trigger: (x, trigger), lambda trigger, g: (jnp.where(trigger > 0, jnp.inf, 1.0) * g, None))


class Fragile(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array, bad_forward: jax.Array, bad_backward: jax.Array, bad_term: jax.Array) -> jax.Array:
        self.sow(LossTerm, "size", 0.0 * (x**2).sum() + jnp.where(bad_term, jnp.nan, 0.0).sum())
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
        "bad_term": np.zeros(8, np.int32),
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


@pytest.fixture
def trainer_again(trainer):
    """The same trainer after a good step."""
    trainer.check(trainer.step(batch()))
    return trainer


def everything(trainer):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trainer.state_tree())]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": (3, np.nan)}, r"batch field 'inputs' is not finite in microbatch 1"),
        ({"bad_forward": (5, 1)}, r"the output of layers/2 \(stage 1\) is not finite in microbatch 2"),
        (
            {"bad_term": (4, 1)},
            r"the term 'size' that layers/2 \(stage 1\) adds to the loss is not finite in microbatch 2",
        ),
        ({"bad_backward": (6, 1)}, r"the gradient of .*layers/2.*\(stage 1\) is not.* in microbatch 3"),
        ({"inputs": (0, 1e30)}, r"not finite"),
    ],
    ids=["batch", "forward", "term", "backward", "overflow"],
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


def test_an_update_of_weight_0_is_left_out_and_nothing_breaks(trainer_again):
    trainer = trainer_again
    before, number = everything(trainer), trainer.step_number
    nothing = batch(weight=(slice(None), 0.0))
    result = trainer.step(nothing)
    trainer.check(result)
    assert not bool(result.applied)
    assert (float(result.loss), float(result.grad_norm)) == (0.0, 0.0)
    assert everything(trainer) == before
    assert trainer.step_number == number + 1  # it counts as a step
    loss, gradients = trainer.loss_and_gradients(nothing)
    assert all(np.isfinite(leaf).all() for leaf in [loss, *gradients.values()])
    assert np.isnan(trainer.evaluate([nothing])["loss"])
    after = trainer.step(batch())
    trainer.check(after)
    assert bool(after.applied)
    assert everything(trainer) != before


def test_an_update_of_weight_0_with_a_value_that_is_not_finite_is_told(trainer_again):
    with pytest.raises(NonFiniteError, match="batch field 'inputs' is not finite") as caught:
        trainer_again.check(
            trainer_again.step(batch(weight=(slice(None), 0.0)) | {"inputs": batch()["inputs"] * np.nan})
        )
    assert caught.value.left_out


def test_an_update_that_overflows_is_told():
    trainer = Trainer([dense, dense], loss, optax.sgd(1e38), batch=batch(), mesh=make_mesh(2))
    result = trainer.step({**batch(), "inputs": 30 * batch()["inputs"]})
    with pytest.raises(NonFiniteError, match=r"Step 1 has a finite loss .* parameters of stage \d not finite"):
        trainer.check(result)


def with_leaf(trainer, path, value):
    """The trainer's trees with another value of one parameter."""
    trees = [{section: dict(leaves) for section, leaves in tree.items()} for tree in trainer.state_tree()]
    (owner,) = [tree["params"] for tree in trees if path in tree["params"]]
    owner[path] = jax.device_put(value, owner[path].sharding)
    return trees


def test_a_parameter_that_is_not_finite_is_named(trainer):
    kernel = np.array(trainer.params["layers/3/kernel"])
    trainer.load_state_tree(with_leaf(trainer, "layers/3/kernel", kernel * np.nan), 7)
    with pytest.raises(NonFiniteError, match=r"Step 8 .*parameter layers/3/kernel already is not finite"):
        trainer.check(trainer.step(batch()))
    trainer.load_state_tree(with_leaf(trainer, "layers/3/kernel", kernel), 7)
    trainer.check(trainer.step(batch()))


def test_checking_a_later_step_names_the_first_bad_one(trainer_again):
    good, number = everything(trainer_again), trainer_again.step_number
    trainer_again.step(batch(bad_forward=(5, 1)))
    later = [trainer_again.step(batch()) for _ in range(2)]
    with pytest.raises(NonFiniteError, match=rf"Step {number + 1} .*layers/2 \(stage 1\).* in microbatch 2"):
        trainer_again.check(later[-1])
    assert everything(trainer_again) == good
    assert trainer_again.step_number == number
    trainer_again.check(trainer_again.step(batch()))


def test_checking_a_step_that_was_left_out_changes_nothing(trainer_again):
    number = trainer_again.step_number
    bad, later = trainer_again.step(batch(bad_forward=(5, 1))), trainer_again.step(batch())
    with pytest.raises(NonFiniteError, match=f"Step {number + 1} is not finite"):
        trainer_again.check(bad)
    for _ in range(3):
        trainer_again.check(trainer_again.step(batch()))
    good = everything(trainer_again)
    with pytest.raises(NonFiniteError, match=f"Step {number + 2} was left out"):
        trainer_again.check(later)
    assert trainer_again.step_number == number + 3
    assert everything(trainer_again) == good


class Pair(nnx.Module):
    """Hands over an integer beside its output."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.linear(x), jnp.argmax(x, axis=-1)


class Single(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(4, 4, rngs=rngs)

    def __call__(self, value: tuple[jax.Array, jax.Array], bad_backward: jax.Array) -> jax.Array:
        return explode(value[0], bad_backward.sum()) + self.embed(value[1])


def test_gradients_beside_an_integer_between_stages_are_searched():
    trainer = Trainer([Pair, Single], loss, optax.sgd(0.1), batch=batch(), mesh=make_mesh(2))
    trainer.check(trainer.step(batch()))
    with pytest.raises(NonFiniteError, match=r"Step 2 .*gradient of .*layers/1 \(stage 1\).* in microbatch 0"):
        trainer.check(trainer.step(batch(bad_backward=(6, 1))))


def test_search_on_a_mesh_with_every_axis():
    trainer = Trainer(
        [dense, Fragile, dense],
        loss,
        optax.sgd(0.1),
        batch=batch(),
        mesh=make_mesh(2, 2, 2),
        pipeline=PipelineConfig(num_microbatches=2, partition="0,1"),
    )
    with pytest.raises(NonFiniteError, match=r"Step 1 .*output of layers/1 \(stage 1\) .* in microbatch 1"):
        trainer.check(trainer.step(batch(bad_forward=(5, 1))))
