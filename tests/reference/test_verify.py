"""Verify passes what is right, and each silent mistake that others have shipped makes it fail."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from flax import nnx

import meshpipe.layers.stage_function
import meshpipe.optimizer.tied
import meshpipe.optimizer.updates
import meshpipe.reference.plain
import meshpipe.stage.compile_stages
from meshpipe import PipelineConfig, make_mesh, verify
from meshpipe.stage.programs import compile_stage

WIDTH = 8


class Embed(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, inputs):
        return self.embed(inputs)


class Head(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.embed.attend(x)


LAYERS = [
    Embed,
    lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
    lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
    Head,
]
TIED = [("layers/0/embed/embedding", "layers/3/embed/embedding")]
RNG = np.random.default_rng(0)
BATCHES = [
    {
        "inputs": RNG.integers(0, WIDTH, 16).astype(np.int32),
        "labels": RNG.integers(0, WIDTH, 16).astype(np.int32),
        "weight": np.repeat(np.float32([0, 1, 2, 1]), 4),
    }
    for _ in range(2)
]


def loss(output, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"])
    return (losses * batch["weight"]).sum(), batch["weight"].sum()


def report(**options):
    return verify(
        LAYERS,
        loss,
        options.pop("optimizer", optax.adam(1e-2)),
        batches=BATCHES,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=4),
        tied=TIED,
        **options,
    )


def test_a_right_layout_passes():
    found = report(clip_norm=0.1)
    assert found.ok, found.first
    assert found.first is None
    quantities = {d.quantity for d in found.differences}
    assert quantities == {
        *("number of leaves", "initial parameter", "tied parameter"),
        *("loss", "gradient norm", "gradient", "parameter", "optimizer state"),
        *("uninterrupted loss", "uninterrupted gradient norm"),
    }


def test_dropout_and_batch_statistics_pass():
    found = verify(
        small_model.LAYERS,
        small_model.loss,
        optax.sgd(0.1),
        batches=small_model.batches(2),
        mesh=make_mesh(2, 2),
        pipeline=PipelineConfig(num_microbatches=2, remat="full"),
    )
    assert found.ok, found.first
    assert any(d.quantity == "state" for d in found.differences)


def test_normalising_each_microbatch_is_found(monkeypatch):
    original = meshpipe.layers.stage_function._loss

    def mean(*arguments):
        total, weight = original(*arguments)
        return total / jnp.maximum(weight, 1.0), (weight > 0).astype(jnp.float32)

    monkeypatch.setattr(meshpipe.layers.stage_function, "_loss", mean)
    found = report()
    assert not found.ok
    assert found.first.update == 1


def test_dividing_twice_is_found(monkeypatch):
    """In the update alone: the reported loss and norm look right, and Adam hides the rest."""
    original = meshpipe.optimizer.updates.UpdatePrograms._summary

    def summary(self, *arguments):
        scale, *others = original(self, *arguments)
        return scale / 4, *others

    monkeypatch.setattr(meshpipe.optimizer.updates.UpdatePrograms, "_summary", summary)
    found = report()
    assert not found.ok
    assert (found.first.quantity, found.first.update) == ("gradient", 1)


def test_counting_a_tied_weight_twice_in_the_norm_is_found(monkeypatch):
    original = meshpipe.optimizer.updates.UpdatePrograms._sum_of_squares

    def counts_all(self, stage):
        return original(self, dataclasses.replace(stage, borrowed=frozenset()))

    monkeypatch.setattr(meshpipe.optimizer.updates.UpdatePrograms, "_sum_of_squares", counts_all)
    found = report()
    assert not found.ok
    assert found.first.quantity == "gradient norm"


def test_adding_a_tied_gradient_twice_is_found(monkeypatch):
    original = meshpipe.optimizer.tied.TiedLeaves.sum_gradients
    twice = lambda self, gradients: original(self, original(self, gradients))  # noqa: E731
    monkeypatch.setattr(meshpipe.optimizer.tied.TiedLeaves, "sum_gradients", twice)
    found = report()
    assert not found.ok
    assert found.first.update == 1
    wrong = {d.path for d in found.differences if d.quantity == "gradient" and d.update == 1 and not d.ok}
    assert wrong == {TIED[0][0]}


def test_clipping_each_stage_is_found(monkeypatch):
    """Each stage scales by its own norm; the reported norm is the right one."""
    original = meshpipe.optimizer.updates.UpdatePrograms._update

    def update(self, stage):
        inner, norm = original(self, stage), self._sum_of_squares(stage)

        def clipped(params, opt_state, gradients, before, after, scale, *others):
            own = jnp.sqrt(norm(gradients, ()))
            return inner(params, opt_state, gradients, before, after, 0.1 / own, *others)

        return clipped

    monkeypatch.setattr(meshpipe.optimizer.updates.UpdatePrograms, "_update", update)
    found = report(clip_norm=0.1)
    assert not found.ok
    assert found.first.quantity == "gradient"


def test_wiping_an_accumulator_is_found(monkeypatch):
    """Only the last microbatch trains the second stage."""

    def compile_and_wipe(stage, *arguments, **options):
        programs = compile_stage(stage, *arguments, **options)
        if stage.spec.index == 0:
            return programs
        wiped = lambda accumulators, *rest: programs.backward(programs.zeros()[0], *rest)  # noqa: E731
        return dataclasses.replace(programs, backward=wiped)

    monkeypatch.setattr(meshpipe.stage.compile_stages, "compile_stage", compile_and_wipe)
    found = report()
    assert not found.ok
    wrong = {d.layer for d in found.differences if d.quantity == "gradient" and d.update == 1 and not d.ok}
    assert "layers/2" in wrong
    assert "layers/1" not in wrong


def test_a_wrong_gradient_in_one_leaf_names_its_layer(monkeypatch):
    @jax.custom_vjp
    def identity(x):
        return x

    # Wrong by a thousandth, and only where the engine runs it: the plain computation is compiled first here.
    state = {"factor": 1.001}
    identity.defvjp(lambda x: (x, None), lambda _, g: (g * state["factor"],))

    class Wrong(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            kernel = identity(self.linear.kernel.get_value())
            return x @ kernel + self.linear.bias.get_value()

    original = meshpipe.reference.plain.PlainTraining.gradients

    def right(self, *arguments):
        state["factor"] = 1.0
        return original(self, *arguments)

    monkeypatch.setattr(meshpipe.reference.plain.PlainTraining, "gradients", right)
    found = verify(
        [Embed, Wrong, Head],
        loss,
        optax.adam(1e-2),
        batches=BATCHES,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
    )
    assert not found.ok
    assert found.first.path == "layers/1/linear/kernel"
    assert found.first.layer == "layers/1"


def test_matrices_are_multiplied_in_full_precision_on_both_sides():
    """By themselves, accelerators round factors in float32 to as few as ten bits."""
    seen = []

    def record(where):
        seen.append((where, jax.config.jax_default_matmul_precision))

    @jax.custom_vjp
    def double(x):
        return 2 * x

    def double_backward(_, gradient):
        record("backward")
        return (2 * gradient,)

    double.defvjp(lambda x: (2 * x, None), double_backward)

    class Recording(nnx.Linear):
        def __call__(self, x):
            record("forward")
            return double(super().__call__(x))

    def update(updates, state, params=None):
        record("update")
        return updates, state

    recording = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    layers = [Embed, lambda rngs: Recording(WIDTH, WIDTH, rngs=rngs), Head]
    pipeline = PipelineConfig(num_microbatches=2)
    optimizer = optax.chain(recording, optax.sgd(0.1))
    report = verify(layers, loss, optimizer, batches=BATCHES[:1], mesh=make_mesh(3), pipeline=pipeline)
    assert report.ok
    assert set(seen) == {(where, "highest") for where in ("forward", "backward", "update")}
    assert jax.config.jax_default_matmul_precision is None


def test_no_batches_is_an_error():
    with pytest.raises(ValueError, match="at least one batch"):
        verify(LAYERS, loss, optax.sgd(0.1), batches=[])
