"""State that is updated once per step: over all microbatches and devices, and only where the step is kept."""

import experts
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import meshpipe.reference.plain
from meshpipe import PipelineConfig, Trainer, make_mesh, verify
from meshpipe.layers.after_step import after_step_of
from meshpipe.layers.examine import abstract_layers

LAYERS = [experts.Embed, experts.BalancedByBias, experts.BalancedByBias, experts.Head]
BATCHES = experts.batches(3)


def by_hand(first):
    """The same on one device without meshpipe: whole batches, and the bias updated after each."""
    model = nnx.List([layer(nnx.Rngs(0)) for layer in LAYERS])
    for key, variable in nnx.to_flat_state(nnx.state(model)):
        if (path := "/".join(("layers", *map(str, key)))) in first:
            variable[...] = first[path]
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def mean(model):
            x = batch["inputs"]
            for layer in model:
                x = layer(x)
            total, weight = experts.loss(x, batch)
            return total / weight

        optimizer.update(model, nnx.grad(mean)(model))
        for layer in (model[1], model[2]):
            layer.after_step()

    for batch in BATCHES:
        step(model, optimizer, batch)
    return [np.asarray(layer.bias[...]) for layer in (model[1], model[2])]


@pytest.fixture(scope="module")
def trained():
    """A trainer after three steps, and the parameters that it began with."""
    trainer = Trainer(
        LAYERS,
        experts.loss,
        optax.sgd(0.1),
        batch=BATCHES[0],
        mesh=make_mesh(2, 2),
        pipeline=PipelineConfig(num_microbatches=4),
    )
    first = {path: np.asarray(value) for path, value in trainer.params.items()}
    for batch in BATCHES:
        trainer.step(batch)
    return trainer, first


def test_a_router_is_balanced_by_the_tokens_of_the_whole_batch(trained):
    trainer, first = trained
    expected = by_hand(first)
    for index, bias in zip((1, 2), expected, strict=True):
        assert len(set(bias.tolist())) > 1
        np.testing.assert_allclose(trainer.state[f"layers/{index}/bias"], bias, atol=1e-7)
        np.testing.assert_array_equal(trainer.state[f"layers/{index}/tokens"], 0)


def test_it_says_what_runs_once_per_step(trained):
    assert "Run once per step, after the update: after_step of layers/1, layers/2." in trained[0].notes


def test_a_step_that_is_left_out_leaves_it_out(trained):
    trainer = trained[0]
    before = {path: np.asarray(value) for path, value in trainer.state.items()}
    result = trainer.step({**BATCHES[0], "weight": np.zeros_like(BATCHES[0]["weight"])})
    assert not result.applied
    for path, value in before.items():
        np.testing.assert_array_equal(trainer.state[path], value, err_msg=path)


class Base(nnx.Module):
    def __init__(self, rngs):
        self.linear, self.drop = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.mean, self.mask = nnx.Variable(jnp.zeros((4, 4))), nnx.Variable(jnp.ones((4, 4)))

    def __call__(self, x):
        return self.linear(x)


class Follows(Base):
    """A running mean of a parameter, as it is after the update."""

    def after_step(self):
        self.mean[...] = 0.5 * self.mean[...] + 0.5 * self.mask[...] * self.linear.kernel[...]


class Takes(Base):
    def after_step(self, step):
        pass


class Draws(Base):
    def after_step(self):
        self.mean[...] = self.drop(self.mask[...])


class Writes(Base):
    def after_step(self):
        self.linear.kernel[...] = self.linear.kernel[...] / 2


class Makes(Base):
    def after_step(self):
        self.new = nnx.Variable(jnp.zeros(()))


class Remembers(Base):
    def after_step(self):
        self.steps = 1


class Sows(Base):
    def after_step(self):
        self.sow(meshpipe.LossTerm, "late", jnp.ones(()))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Sows, r"must be sown in __call__, .* layers/0 \(Sows\) sows layers/0/late in after_step, which nothing"),
        (
            Takes,
            r"after_step runs once per step, and takes no arguments. That of Takes in layers/0 \(Takes\) takes step",
        ),
        (Draws, r"after_step must not draw random numbers. layers/0 \(Draws\) does"),
        (Writes, r"Parameters are changed by the optimizer alone. .* layers/0/linear/kernel in after_step. Keep what"),
        (Makes, r"\(Makes\) made layers/0/new \(Variable\) in after_step"),
        (Remembers, r"A layer's after_step is traced once .* changed layers/0.steps"),
    ],
)
def test_what_it_must_not_do(layer, message):
    with pytest.raises(ValueError, match=message):
        after_step_of(abstract_layers([layer], ("inputs",)), ())


def test_what_it_reads_and_writes_is_known():
    layers = abstract_layers([lambda rngs: nnx.Linear(4, 4, rngs=rngs), Follows], ("inputs",))
    found = after_step_of(layers, ())
    assert found.writes == {"layers/1/mean"}
    assert found.reads == {"layers/1/mean", "layers/1/mask", "layers/1/linear/kernel"}
    with pytest.raises(ValueError, match="reads layers/1/linear/kernel, which is tied"):
        after_step_of(layers, {"layers/1/linear/kernel"})


def test_it_sees_the_updated_parameters():
    batch = {"inputs": np.ones((4, 4), np.float32)}
    trainer = Trainer(
        [Follows, Follows],
        lambda output, batch: (output.sum(), output.size),
        optax.sgd(0.1),
        batch=batch,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
    )
    before = np.asarray(trainer.params["layers/0/linear/kernel"])
    trainer.step(batch)
    after = np.asarray(trainer.params["layers/0/linear/kernel"])
    assert np.any(after != before)
    np.testing.assert_array_equal(trainer.state["layers/0/mean"], 0.5 * after)


class Uncut(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([layer(rngs) for layer in LAYERS])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("reference", [None, pytest.param(Uncut, marks=pytest.mark.slow)])
def test_verify_follows_it(reference):
    pipeline = PipelineConfig(num_microbatches=2)
    options = {"batches": BATCHES[:2], "mesh": make_mesh(2), "pipeline": pipeline, "reference": reference}
    report = verify(LAYERS, experts.loss, optax.sgd(0.1), **options)
    assert report.ok, report.first
    assert any(d.path == "layers/1/bias" and d.quantity == "state" for d in report.differences)


@pytest.mark.slow
def test_verify_finds_that_it_runs_with_each_microbatch(monkeypatch):
    """The bias follows the tokens of half a batch, twice."""
    call = experts.BalancedByBias.__call__

    def call_and_update(self, x):
        output = call(self, x)
        if engine:
            self.after_step()
        return output

    original, engine = meshpipe.reference.plain.PlainTraining.gradients, [True]

    def right(self, *arguments):
        engine.clear()
        return original(self, *arguments)

    monkeypatch.setattr(meshpipe.reference.plain.PlainTraining, "gradients", right)
    monkeypatch.setattr(experts.BalancedByBias, "__call__", call_and_update)
    pipeline = PipelineConfig(num_microbatches=2)
    report = verify(LAYERS, experts.loss, optax.sgd(0.1), batches=BATCHES[:1], mesh=make_mesh(2), pipeline=pipeline)
    assert {"layers/1/bias", "layers/2/bias"} <= {d.path for d in report.differences if not d.ok}
