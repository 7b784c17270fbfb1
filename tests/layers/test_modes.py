"""Training and evaluation reach every module that leaves them open, and none that a constructor fixed."""

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

WIDTH = 8
X = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)


def layer_of(layer: Any, *fields: str) -> Layer:
    return abstract_layers([layer], ("inputs", *fields))[0]


def call(layer: Layer, *, train: bool, batch: Any = None) -> Any:
    params, state = layer.initialise(jax.random.key(0), jnp.uint32(0))
    draws = Randomness(jax.random.key_data(jax.random.key(0)), jnp.uint32(0), jnp.uint32(0))
    return layer(params, state, X, batch or {}, draws, train=train)[:2]


class Net(nnx.Module):
    """Dropout and batch statistics at a depth, each perhaps fixed."""

    def __init__(self, rngs: nnx.Rngs, **fixed: Any):
        self.inner = nnx.Dict({"drop": nnx.Dropout(0.5, rngs=rngs, deterministic=fixed.get("deterministic", False))})
        self.blocks = nnx.List([nnx.BatchNorm(WIDTH, use_running_average=fixed.get("average", False), rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner["drop"](self.blocks[0](x))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("average", [False, None, True])
@pytest.mark.parametrize("deterministic", [False, None, True])
def test_what_is_true_stays(train: bool, average: bool | None, deterministic: bool | None) -> None:
    layer = layer_of(lambda rngs: Net(rngs, average=average, deterministic=deterministic))
    output, after = call(layer, train=train)
    dropped = bool((np.asarray(output) == 0).any())
    moved = bool(np.asarray(after["layers/0/blocks/0/mean"]).any())
    assert dropped == (train and deterministic is not True)
    assert moved == (train and average is not True)
    names = {"layers/0/inner/drop.deterministic"} if deterministic else set()
    assert set(layer.pinned) == names | ({"layers/0/blocks/0.use_running_average"} if average else set())


@pytest.mark.parametrize(
    "fix",
    [
        lambda net: net.eval() or net,
        lambda net: net.set_attributes(nnx.BatchNorm, use_running_average=True) or net,
        lambda net: nnx.view(net, use_running_average=True),
    ],
)
def test_a_module_that_its_owner_switched_stays_so(fix: Any) -> None:
    layer = layer_of(fix(Net(nnx.Rngs(0))))
    _, after = call(layer_of(lambda rngs: fix(Net(rngs))), train=True)
    assert "layers/0/blocks/0.use_running_average" in layer.pinned
    assert not np.asarray(after["layers/0/blocks/0/mean"]).any()


class Told(nnx.Module):
    def __call__(
        self,
        x: jax.Array,
        train: bool,
        *,
        training: bool = True,
        deterministic: bool = False,
        use_running_average: bool | None = None,
    ) -> Any:
        return train, training, deterministic, use_running_average


@pytest.mark.parametrize("train", [True, False])
def test_a_call_is_told_the_mode_by_each_usual_keyword(train: bool) -> None:
    assert call(layer_of(Told), train=train)[0] == (train, train, not train, not train)


class Asks(nnx.Module):
    """Passes None on, which lets its dropout decide."""

    def __init__(self, rngs: nnx.Rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs, deterministic=True)

    def __call__(self, x: jax.Array, deterministic: bool | None = None) -> jax.Array:
        return self.drop(x, deterministic=deterministic)


class Own(nnx.Module):
    """Fixes its own mode, which its call reads by a keyword."""

    def __init__(self) -> None:
        self.deterministic = True

    def __call__(self, x: jax.Array, deterministic: bool = False) -> bool:
        return deterministic


def test_a_keyword_does_not_undo_what_is_fixed() -> None:
    np.testing.assert_array_equal(call(layer_of(Asks), train=True)[0], X)
    assert call(layer_of(Own), train=True)[0] is True


class Computed(nnx.Module):
    """`deterministic` is no switch here."""

    @property
    def deterministic(self) -> bool:
        return False

    def __call__(self, x: jax.Array) -> bool:
        return self.deterministic


def test_a_property_is_left_alone() -> None:
    assert call(layer_of(Computed), train=False)[0] is False


class Named(nnx.Module):
    """Has a mode of its own."""

    def __init__(self) -> None:
        self.mode, self.drop = "unset", nnx.Dropout(0.5, deterministic=True)
        self.frozen = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=nnx.Rngs(0))

    def train(self, **attributes: Any) -> None:
        super().train(**attributes)
        self.mode = "train"

    def eval(self, **attributes: Any) -> None:
        super().eval(**attributes)
        self.mode = "eval"

    def __call__(self, x: jax.Array) -> Any:
        return self.mode, self.drop.deterministic, self.frozen.use_running_average


@pytest.mark.parametrize(("train", "mode"), [(True, "train"), (False, "eval")])
def test_a_method_of_the_modules_own_is_called_and_undoes_nothing(train: bool, mode: str) -> None:
    assert call(layer_of(Named), train=train)[0] == (mode, True, True)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)
        self.linear, self.drop = nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array, *, deterministic: bool = False) -> jax.Array:
        return self.drop(self.linear(self.norm(x)), deterministic=deterministic)


def loss(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, int]:
    return (output**2).sum(), output.size


def test_a_trainer_keeps_frozen_statistics_and_evaluates_without_dropout() -> None:
    batch = {"inputs": X}
    layers = [Block(nnx.Rngs(0)), Block(nnx.Rngs(1))]
    found = []
    for seed in (0, 1):
        trainer = Trainer(
            layers,
            loss,
            optax.sgd(0.1),
            batch=batch,
            mesh=make_mesh(2),
            pipeline=PipelineConfig(num_microbatches=2),
            seed=seed,
        )
        before = {path: np.asarray(leaf) for path, leaf in trainer.state.items()}
        found.append(trainer.evaluate([batch])["loss"])
        trainer.check(trainer.step(batch))
        for path, leaf in trainer.state.items():
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert found[0] == found[1]
    assert trainer.notes[1:] == (
        "Kept in training as the modules have it: use_running_average=True of layers/0/norm, layers/1/norm.",
    )
