"""Layers against the uncut model that they were cut from: what is right passes, whatever layers share or lose is found.

The faults are planted in the layers, so that the trainer and the layers one after the other agree with each other.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Reference, lora, make_mesh, verify

WIDTH, VOCABULARY = 4, 8
RNG = np.random.default_rng(0)
TOKENS = [
    {name: RNG.integers(0, VOCABULARY, 16).astype(np.int32) for name in ("inputs", "labels")}
    | {"shift": RNG.normal(size=16).astype(np.float32)}
    for _ in range(2)
]


class Embed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Param(rngs.params.normal((VOCABULARY, WIDTH)))

    def encode(self, tokens: jax.Array) -> jax.Array:
        return self.table[...][tokens]

    def decode(self, x: jax.Array) -> jax.Array:
        return x @ self.table[...].T


class Model(nnx.Module):
    """A tied embedding, blocks of equal shapes, a norm that is fixed and one that is not, and a constant."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = Embed(rngs)
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3)])
        self.fixed = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.scale = nnx.Variable(jnp.float32(0.5))

    def __call__(self, tokens: jax.Array, shift: jax.Array) -> jax.Array:
        x = self.embed.encode(tokens) + shift[:, None]
        for block in self.blocks:
            x = x + self.scale[...] * nnx.tanh(block(x))
        return self.embed.decode(self.norm(self.fixed(x)))


class First(nnx.Module):
    def __init__(self, embed: Embed):
        self.embed = embed

    def __call__(self, tokens: jax.Array, shift: jax.Array) -> jax.Array:
        return self.embed.encode(tokens) + shift[:, None]


class Block(nnx.Module):
    def __init__(self, linear: nnx.Linear, scale: nnx.Variable):
        self.linear, self.scale = linear, scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.scale[...] * nnx.tanh(self.linear(x))


class Last(nnx.Module):
    def __init__(self, fixed: nnx.BatchNorm, norm: nnx.BatchNorm, embed: Embed):
        self.fixed, self.norm, self.embed = fixed, norm, embed

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.embed.decode(self.norm(self.fixed(x)))


def cut(model):
    blocks = [Block(block, model.scale) for block in model.blocks]
    return [First(model.embed), *blocks, Last(model.fixed, model.norm, model.embed)]


TIED = [("layers/0/embed/table", "layers/4/embed/table")]


def call(model, batch):
    return model(batch["inputs"], batch["shift"])


def entropy(output, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"])
    return losses.sum(), losses.size


def report(layers, reference, *, loss=entropy, batches=TOKENS, **options):
    return verify(
        layers,
        loss,
        options.pop("optimizer", optax.adam(1e-2)),
        batches=batches,
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
        reference=reference,
        **options,
    )


def wrong(found):
    return {(d.update, d.quantity, d.path) for d in found.differences if not d.ok}


def test_layers_that_are_parts_of_the_model():
    model = Model(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model))
    found = report(cut(model), Reference(model, call=call), tied=TIED, clip_norm=0.1)
    assert found.ok, found.first
    assert found.reference == "the uncut Model"
    initial = {d.path for d in found.differences if d.quantity == "initial parameter"}
    assert {"layers/0/embed/table", "layers/2/linear/kernel", "layers/4/norm/scale"} <= initial
    assert any(d.quantity == "state" for d in found.differences)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_constructors_are_matched_by_shape_and_the_ends_of_paths():
    class Net(nnx.Module):
        """The order of its attributes is not that of their names."""

        def __init__(self, rngs: nnx.Rngs):
            self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
            self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.first(nnx.tanh(self.second(x)))

    class Half(nnx.Module):
        def __init__(self, rngs: nnx.Rngs, bend: bool):
            self.linear, self.bend = nnx.Linear(WIDTH, WIDTH, rngs=rngs), bend

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.tanh(self.linear(x)) if self.bend else self.linear(x)

    layers = [lambda rngs: Half(rngs, True), lambda rngs: Half(rngs, False)]
    found = report(layers, Net, loss=squares, batches=VECTORS)
    assert found.ok, found.first
    swapped = Reference(Net, paths={"layers/0/linear": "first", "layers/1/linear": "second"})
    assert not report(layers, swapped, loss=squares, batches=VECTORS).ok
    right = Reference(Net, paths={"layers/0/linear": "second", "layers/1/linear": "first"})
    assert report(layers, right, loss=squares, batches=VECTORS).ok


VECTORS = [{name: RNG.normal(size=(16, WIDTH)).astype(np.float32) for name in ("inputs", "target")} for _ in range(2)]


def squares(output, batch):
    losses = (output - batch["target"]) ** 2
    return losses.sum(), losses.size


def dense(rngs):
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs)


class Pair(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.second = dense(rngs), dense(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.tanh(self.first(x)))


class Uncut(nnx.Module):
    def __init__(self, part: nnx.Module, last: nnx.Module):
        self.part, self.last = part, last

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.part(x))


@pytest.mark.slow
def test_lost_ties_are_found():
    """One table in the model, two equal ones in the layers."""
    model = Model(nnx.Rngs(0))
    layers = cut(model)
    layers[-1].embed = nnx.clone(model.embed)
    paths = {"layers/4/embed": "embed"}
    found = report(layers, Reference(model, call=call, paths=paths))
    assert not found.ok
    assert (found.first.update, found.first.quantity) == (1, "gradient")
    assert (1, "tied parameter", "layers/4/embed/table") in wrong(found)


def test_lost_ties_without_paths_say_what_to_write():
    model = Model(nnx.Rngs(0))
    layers = cut(model)
    layers[-1].embed = nnx.clone(model.embed)
    with pytest.raises(ValueError, match=r"layers/4/embed/table \[8, 4\] float32 is not.*tied="):
        report(layers, Reference(model, call=call))


@pytest.mark.parametrize("layers_fixed", [False, True], ids=["thawed", "frozen"])
def test_a_norm_in_the_wrong_mode_is_found(layers_fixed):
    norm = nnx.BatchNorm(WIDTH, use_running_average=layers_fixed, rngs=nnx.Rngs(0))
    other = nnx.BatchNorm(WIDTH, use_running_average=not layers_fixed, rngs=nnx.Rngs(0))
    last = dense(nnx.Rngs(1))
    found = report(
        [norm, last], Reference(Uncut(other, last), paths={"layers/0": "part"}), loss=squares, batches=VECTORS
    )
    assert (1, "loss", "") in wrong(found)
    assert (1, "state", "layers/0/mean") in wrong(found)


def test_a_field_of_the_batch_that_reaches_a_layer_unasked_is_found():
    class Shifting(nnx.Module):
        def __init__(self, linear: nnx.Linear):
            self.linear = linear

        def __call__(self, x: jax.Array, target: jax.Array | None = None) -> jax.Array:
            return self.linear(x if target is None else x + target)

    model = Uncut(Shifting(dense(nnx.Rngs(0))), dense(nnx.Rngs(1)))
    assert (1, "loss", "") in wrong(report([model.part, model.last], model, loss=squares, batches=VECTORS))


def test_two_modules_with_one_value_are_found():
    """As where two leaves share a path: each of the model's has a value, the layer's have one for both."""

    class Collided(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = dense(rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.first(nnx.tanh(self.first(x)))

    model = Reference(lambda rngs: Uncut(Pair(rngs), dense(rngs)), paths={"layers/1": "last"})
    found = report([Collided, dense], model, loss=squares, batches=VECTORS)
    assert (1, "gradient", "(part/second/kernel)") in wrong(found)


def test_a_value_read_twice_is_found():
    class Twice(Pair):
        def __call__(self, x: jax.Array) -> jax.Array:
            return self.first(nnx.tanh(self.first(x)))

    right, last = Pair(nnx.Rngs(0)), dense(nnx.Rngs(1))
    layer = Twice(nnx.Rngs(0))
    layer.first, layer.second = right.first, right.second
    found = report([layer, last], Uncut(right, last), loss=squares, batches=VECTORS)
    assert (1, "gradient", "layers/0/second/kernel") in wrong(found)


def test_keys_that_look_like_paths_are_never_one_leaf():
    class Heads(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.heads = nnx.Dict({"a/b": dense(rngs), "a": nnx.Dict({"b": dense(rngs)})})

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.heads["a/b"](x) - self.heads["a"]["b"](x)

    model = Uncut(Heads(nnx.Rngs(0)), dense(nnx.Rngs(1)))
    found = report([model.part, model.last], model, loss=squares, batches=VECTORS[:1])
    leaves = [d for d in found.differences if d.quantity == "gradient" and d.layer == "layers/0"]
    assert found.ok == (len(leaves) == 4)


def test_fewer_leaves_than_variables_are_found(monkeypatch):
    from meshpipe import Trainer

    params = Trainer.params
    monkeypatch.setattr(
        Trainer,
        "params",
        property(lambda self: {p: v for p, v in params.fget(self).items() if "first/kernel" not in p}),
    )
    found = report([Pair, dense], None, loss=squares, batches=VECTORS[:1])
    assert wrong(found) == {(0, "number of leaves", "layers/0")}


def test_a_parameter_that_forward_writes_is_found_where_the_write_is_lost():
    class Normalised(nnx.Module):
        def __init__(self, write: bool):
            self.linear, self.write = dense(nnx.Rngs(0)), write

        def __call__(self, x: jax.Array) -> jax.Array:
            kernel = self.linear.kernel[...]
            kernel = kernel / jnp.linalg.norm(kernel, axis=0)
            if self.write:
                self.linear.kernel[...] = kernel
            return x @ kernel + self.linear.bias[...]

    layer, last = Normalised(False), dense(nnx.Rngs(1))
    layers = [layer, last]
    found = report(
        layers, Reference(Uncut(Normalised(True), last), paths={"layers/0": "part"}), loss=squares, batches=VECTORS
    )
    assert (1, "parameter", "layers/0/linear/kernel") in wrong(found)


def test_a_wrong_initial_value_is_found():
    model = Uncut(dense(nnx.Rngs(0)), dense(nnx.Rngs(1)))
    layers = [model.part, model.last]
    from meshpipe.optimizer.tied import TiedLeaves

    share = TiedLeaves.share_values

    def spoil(self, params):
        return {s: tuple(leaf + 1e-3 for leaf in leaves) for s, leaves in share(self, params).items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TiedLeaves, "share_values", spoil)
        found = report(layers, model, loss=squares, batches=VECTORS[:1])
    assert (0, "initial parameter", "layers/0/kernel") in wrong(found)


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "is_equal"), [(4.0, True), (2.0, False)])
def test_adapters_are_added_to_the_kernels_of_the_model(scale, is_equal):
    """Of ready-made layers, which share their variables with the model; trained with another scale, they differ."""
    part, last = dense(nnx.Rngs(0)), dense(nnx.Rngs(1))
    layers = lora([part, last], rank=2, alpha=8.0, targets=["layers/1"])
    found = report(
        layers, Reference(Uncut(part, last), adapter_scale=scale), loss=squares, batches=VECTORS, optimizer=optax.sgd(1)
    )
    assert found.reference == "the uncut Uncut, adapters in its kernels"
    assert (found.first is None) == is_equal
    if not is_equal:
        assert (1, "gradient", "layers/1/lora/lora_b") in wrong(found)


def test_dropout_is_refused_and_said_why():
    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    last = dense(nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"must not draw random numbers.*part/rngs"):
        report([drop, last], Uncut(drop, last), loss=squares, batches=VECTORS)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (Reference(lambda rngs: Uncut(dense(rngs), dense(rngs)), paths={"layers/7": "part"}), "Got 'layers/7'"),
        (Reference(lambda rngs: Uncut(dense(rngs), dense(rngs)), paths={"layers/0": "parts"}), "to 'parts/bias'"),
        (lambda rngs: dense(rngs), r"layers/1/bias \[4\] float32 is not: no leaf of that shape and name is left"),
        (lambda rngs: Uncut(dense(rngs), nnx.Linear(WIDTH, 3, rngs=rngs)), "layers/1/bias"),
        (lambda rngs: jnp.tanh, "must be an nnx.Module or a constructor of one"),
    ],
    ids=["no such layer", "no such place", "a leaf too few", "another shape", "a function"],
)
def test_what_does_not_correspond_is_refused(reference, message):
    with pytest.raises(ValueError, match=message):
        report([dense, dense], reference, loss=squares, batches=VECTORS)
