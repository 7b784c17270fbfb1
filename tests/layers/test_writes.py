"""A call may change state; whatever else it changes is refused by name, and nothing that it leaves alone."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.layer import Layer, Randomness

WIDTH = 4
X = np.random.default_rng(0).normal(size=(2, WIDTH)).astype(np.float32)


def call(layer: Any) -> Any:
    (abstract,) = abstract_layers([layer], ("inputs",))
    return run(abstract)


def run(layer: Layer) -> Any:
    params, state = layer.initialise(jax.random.key(0), jnp.uint32(0))
    draws = Randomness(jax.random.key_data(jax.random.key(0)), jnp.uint32(0), jnp.uint32(0))
    with warnings.catch_warnings(action="ignore"):
        return jax.eval_shape(lambda p, s: layer(p, s, X, {}, draws, train=True)[:2], params, state)


class Base(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear, self.norm = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls, self.log, self.named = 0, [1], nnx.Dict({"made": nnx.Variable(jnp.zeros(()))})

    def body(self, x: jax.Array) -> jax.Array:
        return self.drop(self.norm(self.linear(x)))


class WritesInPlace(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.linear.kernel[...] = self.linear.kernel[...] * 0.9
        return self.body(x)


class Replaces(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.linear.kernel = nnx.Param(self.linear.kernel[...] * 0.9)
        return self.body(x)


class WritesInside(Base):
    """Behind a transformation that hands every variable back as a new value."""

    @nnx.jit
    def __call__(self, x: jax.Array) -> jax.Array:
        self.linear.bias[...] = self.linear.bias[...] + 1
        return self.body(x)


class WritesInALoop(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        def body(index: jax.Array, carried: Any) -> Any:
            carried[0].linear.bias[...] = carried[0].linear.bias[...] + 1
            return carried

        return self.body(nnx.fori_loop(0, 2, body, (self, x))[1])


class Sows(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.named.sow(nnx.Intermediate, "features", x)
        return self.body(x)


class Loss(nnx.Variable[Any]):
    pass


class SowsALoss(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(Loss, "balance", x.sum())
        return self.body(x)


class Makes(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.cache = nnx.Cache(x)
        return self.body(x)


class Drops(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        del self.named["made"]
        return self.body(x)


class Reshapes(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.named["made"].set_value(x)
        return self.body(x)


class Counts(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls += 1
        return self.body(x) * self.calls


class Logs(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.log.append(x.shape)
        return self.body(x)


class Notes(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.seen = x.shape
        return self.body(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (WritesInPlace, r"layers/0 \(WritesInPlace\) writes to layers/0/linear/kernel in __call__"),
        (Replaces, r"layers/0 \(Replaces\) writes to layers/0/linear/kernel in __call__"),
        (WritesInside, r"layers/0 \(WritesInside\) writes to layers/0/linear/bias in __call__"),
        (WritesInALoop, r"layers/0 \(WritesInALoop\) writes to layers/0/linear/bias in __call__"),
        (
            lambda rngs: nnx.WeightNorm(nnx.Linear(WIDTH, WIDTH, rngs=rngs), rngs=rngs),
            r"layers/0 \(WeightNorm\) writes to layers/0/layer_instance/kernel in __call__",
        ),
        (
            lambda rngs: nnx.SpectralNorm(nnx.Linear(WIDTH, WIDTH, rngs=rngs), rngs=rngs),
            r"layers/0 \(SpectralNorm\) writes to layers/0/layer_instance/kernel in __call__",
        ),
        (SowsALoss, r"\(SowsALoss\) made layers/0/balance \(Loss\) in __call__.* the type meshpipe.LossTerm"),
        (Makes, r"\(Makes\) made layers/0/cache \(Cache\) in __call__, .* Make it in the constructor"),
        (Drops, r"\(Drops\) dropped layers/0/named/made in __call__"),
        (Reshapes, r"\(Reshapes\) made layers/0/named/made float32\[2, 4\] in __call__; it was float32\[\]"),
        (Counts, r"\(Counts\) changed layers/0.calls. Keep a number that changes in an nnx.Variable"),
        (Logs, r"\(Logs\) changed layers/0.log."),
        (Notes, r"\(Notes\) changed layers/0.seen."),
    ],
)
def test_what_would_vanish_is_refused_by_name(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(layer)


class Rematerialised(Base):
    @nnx.remat
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.body(x)


class Jitted(Base):
    @nnx.jit
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.body(x)


class Branches(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.cond(x.sum() > 0, lambda m, x: m.linear(x), lambda m, x: m.linear(-x), self, x)


class Loops(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.fori_loop(0, 2, lambda i, carried: (carried[0], carried[0].linear(carried[1])), (self, x))[1]


class Custom(Base):
    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.custom_vjp
        def f(module: Base, x: jax.Array) -> jax.Array:
            return module.linear(x)

        f.defvjp(lambda module, x: (f(module, x), module), lambda module, gradient: gradient)
        return f(self, x)


class Captured(Base):
    """Sows, for itself."""

    def __call__(self, x: jax.Array) -> jax.Array:
        def inner(module: Base, x: jax.Array) -> jax.Array:
            module.sow(nnx.Intermediate, "features", x)
            return module.body(x)

        return nnx.capture(inner, nnx.Intermediate)(self, x)[0]


class Switches(Base):
    """Sets a mode that the trainer sets before every call."""

    def __call__(self, x: jax.Array) -> jax.Array:
        self.norm.eval()
        return self.body(x)


def stacked(axis: int) -> Any:
    class Scanned(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=axis)
            def make(rngs: nnx.Rngs) -> nnx.Linear:
                return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

            self.blocks = make(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.scan(lambda block, x: block(x), in_axes=(axis, nnx.Carry), out_axes=nnx.Carry)(self.blocks, x)

    return Scanned


class Counter(Base):
    """State that calls may change."""

    def __call__(self, x: jax.Array) -> jax.Array:
        self.named["made"][...] = self.named["made"][...] + 1
        return self.body(x)


@pytest.mark.parametrize(
    "layer",
    [
        *(Rematerialised, Jitted, Branches, Loops, Custom, Captured, Switches, Sows),
        *(stacked(0), stacked(1), stacked(-1), Counter),
    ],
)
def test_what_is_left_alone_or_is_state_is_taken(layer: Any) -> None:
    output, after = call(layer)
    assert output.shape == X.shape
    assert after.keys() == abstract_layers([layer], ("inputs",))[0].state.keys()


def test_values_sown_before_training_are_to_be_dropped_first() -> None:
    module = Sows(nnx.Rngs(0))
    with warnings.catch_warnings(action="ignore"):
        module(X)
    with pytest.raises(ValueError, match=r"layers/0/named/features \(Intermediate\) holds a tuple. Drop what"):
        call(module)


def test_a_trainer_says_it_before_the_first_step() -> None:
    batch = {"inputs": X}
    with pytest.raises(ValueError, match=r"^Parameters are changed by the optimizer alone. layers/1 \(WritesInPlace\)"):
        Trainer(
            [Jitted, WritesInPlace],
            lambda output, batch: (output.sum(), output.size),
            optax.sgd(0.1),
            batch=batch,
            mesh=make_mesh(2),
            pipeline=PipelineConfig(num_microbatches=1),
        )
