"""What layers sow is collected by name, whatever transforms surround it; what cannot be is refused."""

import dataclasses
import json
import warnings

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_recipes
from flax import nnx
from one_layer import X, draws, layer_of, values

import meshpipe
from meshpipe import LossTerm, PipelineConfig, Trainer, make_mesh
from meshpipe.layers.reserved_names import RESERVED
from meshpipe.layers.sown import read_by_name


def sown_by(layer):
    layer = layer_of(layer)
    return layer(values(layer.params), values(layer.state), X, {}, draws(), train=True)[2]


class Part(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(X.shape[-1], X.shape[-1], rngs=rngs)

    def __call__(self, x):
        self.sow(LossTerm, "balance", jnp.ones(3))
        self.sow(nnx.Intermediate, "size", jnp.float32(2.0))
        self.sow(nnx.Intermediate, "features", x)
        return self.linear(x)


class Twice(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = Part(rngs), Part(rngs)

    def __call__(self, x):
        return self.second(self.first(self.first(x)))


class Jitted(Twice):
    @nnx.jit
    def __call__(self, x):
        return super().__call__(x)


class Rematerialised(Twice):
    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


@pytest.mark.parametrize("layer", [Twice, Jitted, Rematerialised])
def test_calls_and_modules_of_a_layer_add_up(layer):
    found = sown_by(layer)
    assert {name: float(value) for name, value in found.terms.items()} == {"balance": 9.0}
    assert {name: (float(total), count) for name, (total, count) in found.metrics.items()} == {"size": (6.0, 3)}
    assert [value.shape for value in found.values["features"]] == [X.shape] * 3


def test_only_what_is_sown_can_be_read_by_name():
    found = sown_by(Part)
    assert {name: np.shape(value) for name, value in read_by_name(found, ("size", "features"), "a").items()} == {
        "size": (),
        "features": X.shape,
    }
    for name, way_out in (("feature", "Correct the name."), ("balance", "A term is a part of the loss already.")):
        with pytest.raises(ValueError, match=rf"layers/0 sows features, size, and '{name}' is asked for. {way_out}"):
            read_by_name(found, (name,), "layers/0")


def test_a_scan_over_blocks_adds_up():
    class Scanned(nnx.Module):
        def __init__(self, rngs):
            @nnx.split_rngs(splits=4)
            @nnx.vmap(in_axes=0, out_axes=0)
            def make(rngs):
                return Part(rngs)

            self.blocks = make(rngs)

        def __call__(self, x):
            return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)

    assert float(sown_by(Scanned).terms["balance"]) == 12.0


def sowing(kind, name, value):
    class Sows(nnx.Module):
        def __init__(self, rngs):
            pass

        def __call__(self, x):
            self.sow(kind, name, value)
            self.sow(LossTerm, "other", 1.0)
            return x

    return Sows


class Own(nnx.Variable):
    pass


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            sowing(LossTerm, "loss", 1.0),
            r"must not have a name that the results of a step have. .*\(Sows\) sows 'loss'",
        ),
        (sowing(nnx.Intermediate, "step_time_s", 1.0), r"\(Sows\) sows 'step_time_s'"),
        (sowing(LossTerm, "balance", "text"), r"must be a real number, .*\(Sows\) sows a str as 'balance'"),
        (sowing(LossTerm, "balance", 1j), r"\(Sows\) sows complex numbers as 'balance'"),
        (sowing(Own, "balance", 1.0), r"\(Sows\) made layers/0/balance \(Own\) in __call__"),
        (sowing(nnx.Intermediate, "other", 1.0), "to be of type 'LossTerm', got 'Intermediate'"),
    ],
)
def test_what_cannot_be_is_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        sown_by(layer)


def test_terms_sown_before_training_are_to_be_dropped_first():
    module = Part(nnx.Rngs(0))
    with warnings.catch_warnings(action="ignore"):
        module(X)
    with pytest.raises(ValueError, match=r"layers/0/balance. Drop it: nnx.pop\(module, meshpipe.LossTerm\)"):
        layer_of(module)


def squares(output, batch):
    return (output**2).sum(), output.size


def test_evaluation_and_prediction_with_layers_that_sow():
    batch = {"inputs": np.ones((6, 4), np.float32)}

    class Sows(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            self.sow(LossTerm, "ones", jnp.ones(x.shape).sum())
            self.sow(nnx.Intermediate, "examples", x.sum(-1))
            self.sow(nnx.Intermediate, "rows", jnp.float32(x.shape[0]))
            return self.linear(x)

    trainer = Trainer(
        [Sows, Sows],
        squares,
        optax.sgd(0.1),
        batch=batch,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=3),
    )
    # Seven examples: a whole batch, and one that is left over.
    found = trainer.evaluate([{"inputs": np.ones((7, 4), np.float32)}])
    assert list(found) == ["loss", "ones", "rows"]
    assert found["ones"] == pytest.approx(2.0)  # in each of two layers 1 per element
    assert found["rows"] == pytest.approx((3 * 2 * 2 + 1) / 7)  # a microbatch weighs as many as it has examples
    assert trainer.predict(batch).shape == (6, 4)
    assert "Sown by Sows and dropped, since they are no scalars: examples." in trainer.notes


def test_no_name_of_the_metrics_file_is_free(tmp_path):
    """A run's step and evaluation events hold reserved names alone, where layers sow nothing."""
    file = tmp_path / "metrics.jsonl"
    config = dataclasses.replace(tiny_recipes.single(), metrics=str(file), steps=2, eval_every=1)
    run = meshpipe.run(config, show=False)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    names = {name for line in lines if line["event"] in ("step", "eval") for name in line}
    assert run.step == 2
    assert names - {"accuracy"} <= RESERVED, names - RESERVED


@pytest.mark.parametrize(
    ("layers", "metrics", "message"),
    [
        (
            [(LossTerm, "size"), (nnx.Intermediate, "size")],
            None,
            "'size' as a term of the loss and an nnx.Intermediate",
        ),
        ([(nnx.Intermediate, "size"), (LossTerm, "a")], "size", "'size' as an nnx.Intermediate and a metric"),
        ([(LossTerm, "size"), (LossTerm, "a")], "size", "'size' as a term of the loss and a metric"),
    ],
)
def test_names_are_told_apart_over_all_stages(layers, metrics, message):
    with pytest.raises(ValueError, match=f"need names of their own. Got {message}. Rename one."):
        Trainer(
            [sowing(kind, name, 1.0) for kind, name in layers],
            squares,
            optax.sgd(0.1),
            batch={"inputs": X},
            mesh=make_mesh(2),
            metrics=metrics and (lambda output, batch: {metrics: (output.sum(), output.size)}),
        )
