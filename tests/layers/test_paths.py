"""Paths tell leaves apart, and ordinary ones are as they always were."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh, verify
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.paths import by_path, check_distinct, join

WIDTH = 4


def test_no_two_sequences_of_strings_have_one_path() -> None:
    words = ["".join(word) for size in range(5) for word in itertools.product("%/25Fa", repeat=size)]
    assert len({join("layers/0", [word]) for word in words}) == len(words)
    short = [word for word in words if len(word) <= 2]
    pairs = list(itertools.product(short, repeat=2))
    assert len({join("layers/0", pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("key", [("linear", "kernel"), ("blocks", 0, "bias"), ("a.b",), ("100%", "%2"), ("a b",)])
def test_ordinary_paths_stay_as_they_were(key: tuple[str | int, ...]) -> None:
    assert join("layers/3", key) == "/".join(("layers/3", *map(str, key)))


def test_what_cannot_be_told_apart_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Two variables of Net have the path layers/0/1. Use keys"):
        check_distinct([join("layers/0", [1]), join("layers/0", ["1"])], "variables of Net")


class Heads(nnx.Module):
    """Keys with separators, in modules and in the names of random streams."""

    def __init__(self, rngs: nnx.Rngs):
        def linear() -> nnx.Linear:
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.m = nnx.Dict({"a/b": linear(), "a": nnx.Dict({"b": linear(), "b%2Fc": linear()}), "a/b/c": linear()})
        self.drops = nnx.Dict({"a/b": nnx.Dropout(0.5, rngs=rngs), "a": nnx.Dict({"b": nnx.Dropout(0.5, rngs=rngs)})})

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.m["a/b"](x) - self.m["a"]["b"](x) + 2 * self.m["a"]["b%2Fc"](x) - 3 * self.m["a/b/c"](x)
        return self.drops["a/b"](x) - self.drops["a"]["b"](x)


def loss(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, int]:
    return (output**2).sum(), output.size


def test_keys_with_separators_are_leaves_of_their_own() -> None:
    (layer,) = abstract_layers([Heads], ("inputs",))
    assert len(layer.params) == 8
    assert {"layers/0/m/a%2Fb/kernel", "layers/0/m/a/b/kernel", "layers/0/m/a/b%252Fc/kernel"} <= layer.params.keys()
    assert len(set(layer.streams)) == 2


def test_they_train_with_values_of_their_own() -> None:
    batch = {"inputs": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}
    layers = [Heads(nnx.Rngs(0)), lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)]
    labels = {"x/y": optax.sgd(0.1, momentum=0.9), "x": optax.sgd(0.2, momentum=0.9)}
    optimizer = optax.multi_transform(
        labels, lambda params: {path: "x" if path.endswith("bias") else "x/y" for path in params}
    )
    mesh, pipeline = make_mesh(2), PipelineConfig(num_microbatches=2)
    trainer = Trainer(layers, loss, optimizer, batch=batch, mesh=mesh, pipeline=pipeline)
    for key, leaf in nnx.to_flat_state(nnx.state(layers[0], nnx.Param)):
        np.testing.assert_array_equal(trainer.params[join("layers/0", key)], leaf.get_value())
    moments = [path for path in trainer.state_tree()[0]["optimizer"] if path.endswith("kernel")]
    assert len(moments) == len(set(moments)) == 4
    assert verify(layers, loss, optimizer, batches=[batch] * 2, mesh=mesh, pipeline=pipeline).ok


def test_leaves_of_an_optimizer_have_paths_of_their_own() -> None:
    one, two = jnp.ones(1), jnp.ones(2)
    state = {"mu": {"layers/0/kernel": one}, "mu/layers": {"0": {"kernel": two}}}
    assert by_path(state, ["layers/0/kernel"]) == {"mu/layers/0/kernel": one, "mu%2Flayers/0/kernel": two}
    with pytest.raises(ValueError, match="Two leaves of the optimizer's state have the path mu/layers/0/kernel"):
        by_path({"mu": {"layers/0/kernel": one, "layers": {"0": {"kernel": two}}}}, ["layers/0/kernel"])
