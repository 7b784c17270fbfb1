"""Layers that hold one variable train it as one parameter, as plain NNX does, and say so."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh, verify, with_fields
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.shared import merge_groups
from meshpipe.optimizer.tied import TiedLeaves

TOKENS, WIDTH, ROWS = 8, 4, 8
TOLERANCE = 1e-5


class Head(nnx.Module):
    def __init__(self, embed: nnx.Embed):
        self.table = embed

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.table.attend(x)


class Deep(nnx.Module):
    """Holds a linear layer at a depth, and its kernel a second time under another name."""

    def __init__(self, linear: nnx.Linear, rngs: nnx.Rngs):
        self.inside = nnx.List([nnx.Dict({"linear": linear})])
        self.weight = linear.kernel
        self.own = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.own(jnp.tanh(self.inside[0]["linear"](x))) @ self.weight[...]


class Last(nnx.Module):
    """Has a variable of another module under a name of its own."""

    def __init__(self, table: nnx.Param[jax.Array]):
        self.kernel = table

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[...].T


def loss(output: jax.Array, batch: Any) -> tuple[jax.Array, int]:
    losses = optax.softmax_cross_entropy_with_integer_labels(output, batch["labels"])
    return losses.sum(), losses.size


def batches(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{n: rng.integers(0, TOKENS, ROWS).astype(np.int32) for n in ("inputs", "labels")} for _ in range(count)]


def embed_and_head() -> list[Any]:
    embed = nnx.Embed(TOKENS, WIDTH, rngs=nnx.Rngs(0))
    return [embed, nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1)), Head(embed)]


def nested() -> list[Any]:
    embed, linear = nnx.Embed(TOKENS, WIDTH, rngs=nnx.Rngs(0)), nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))
    return [embed, linear, Deep(linear, nnx.Rngs(2)), linear, Last(embed.embedding)]


def module_twice() -> list[Any]:
    block = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))
    return [nnx.Embed(TOKENS, WIDTH, rngs=nnx.Rngs(0)), block, with_fields(block), Last(nnx.Param(jnp.ones((8, 4))))]


def plain_losses(layers: list[Any], rows: list[Any]) -> list[float]:
    """The modules themselves, uncut, trained as the documentation of NNX does; what is shared needs graph mode."""
    with nnx.set_graph_mode(True):
        return _plain_losses(layers, rows)


def _plain_losses(layers: list[Any], rows: list[Any]) -> list[float]:
    modules = nnx.List([layer.layer if hasattr(layer, "layer") else layer for layer in layers])
    optimizer = nnx.Optimizer(modules, optax.adam(0.05), wrt=nnx.Param)

    @nnx.jit
    def step(modules: Any, optimizer: Any, batch: Any) -> jax.Array:
        def mean(modules: Any) -> jax.Array:
            value = batch["inputs"]
            for module in modules:
                value = module(value)
            total, weight = loss(value, batch)
            return total / weight

        value, gradients = nnx.value_and_grad(mean)(modules)
        optimizer.update(modules, gradients)
        return value

    return [float(step(modules, optimizer, batch)) for batch in rows]


def trainer_of(layers: list[Any], **more: Any) -> Trainer:
    return Trainer(
        layers,
        loss,
        optax.adam(0.05),
        batch=batches(1)[0],
        mesh=make_mesh(2),
        pipeline=PipelineConfig(num_microbatches=2),
        **more,
    )


@pytest.mark.parametrize(
    ("make", "groups"),
    [
        (embed_and_head, [("layers/0/embedding", "layers/2/table/embedding")]),
        (
            nested,
            [
                ("layers/0/embedding", "layers/4/kernel"),
                ("layers/1/bias", "layers/2/inside/0/linear/bias", "layers/3/bias"),
                ("layers/1/kernel", "layers/2/inside/0/linear/kernel", "layers/3/kernel"),
            ],
        ),
        (module_twice, [("layers/1/bias", "layers/2/bias"), ("layers/1/kernel", "layers/2/kernel")]),
    ],
)
def test_they_train_as_the_uncut_modules_do(make: Any, groups: list[tuple[str, ...]]) -> None:
    rows = batches(4)
    trainer = trainer_of(make())
    assert sorted(trainer.model.tied) == groups
    assert trainer.notes[1].startswith("One variable in several layers, trained as one parameter: layers/")
    assert [float(trainer.step(row).loss) for row in rows] == pytest.approx(plain_losses(make(), rows), abs=TOLERANCE)
    for group in groups:
        for path in group[1:]:
            np.testing.assert_array_equal(trainer.params[path], trainer.params[group[0]])


def test_constructors_that_capture_one_module_share_it_too() -> None:
    embed = nnx.Embed(TOKENS, WIDTH, rngs=nnx.Rngs(0))
    linear = nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(1))

    def through(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(linear, jnp.tanh)

    trainer = trainer_of([embed, through, through, lambda rngs: Head(embed)])
    assert sorted(trainer.model.tied) == [
        ("layers/0/embedding", "layers/3/table/embedding"),
        ("layers/1/layers/0/bias", "layers/2/layers/0/bias"),
        ("layers/1/layers/0/kernel", "layers/2/layers/0/kernel"),
    ]
    rows = batches(3)
    plain = [embed, nnx.Sequential(linear, jnp.tanh), nnx.Sequential(linear, jnp.tanh), Head(embed)]
    assert [float(trainer.step(row).loss) for row in rows] == pytest.approx(plain_losses(plain, rows), abs=TOLERANCE)


def test_constructors_that_make_their_own_share_nothing() -> None:
    def constant(rngs: nnx.Rngs) -> nnx.Module:
        return Last(nnx.Param(np.ones((TOKENS, WIDTH), np.float32)))  # type: ignore[arg-type]

    layers = abstract_layers([constant, constant, lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)], ("inputs",))
    assert [dict(layer.shared) for layer in layers] == [{}, {}, {}]


@pytest.mark.parametrize(
    ("named", "found", "together"),
    [
        ([], (("a", "b"),), (("a", "b"),)),
        ([("b", "a")], (("a", "b"),), (("b", "a"),)),
        ([("b", "c")], (("a", "b"),), (("b", "c", "a"),)),
        ([("a", "x"), ("b", "y")], (("a", "b"),), (("a", "x", "b", "y"),)),
        ([("x", "y")], (("a", "b"),), (("x", "y"), ("a", "b"))),
    ],
)
def test_groups_that_overlap_are_one(named: Any, found: Any, together: Any) -> None:
    assert merge_groups(named, found) == together


def test_what_the_user_has_tied_is_not_told_again() -> None:
    trainer = trainer_of(embed_and_head(), tied=[("layers/0/embedding", "layers/2/table/embedding")])
    assert trainer.model.tied == (("layers/0/embedding", "layers/2/table/embedding"),)
    assert len(trainer.notes) == 1  # what is trained


class Normed(nnx.Module):
    def __init__(self, norm: nnx.BatchNorm):
        self.norm = norm

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


@pytest.mark.parametrize("first", ["ready-made", "another layer like it"])
def test_statistics_that_layers_share_are_refused_where_they_change(first: str) -> None:
    norm = nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0))
    others = [] if first == "ready-made" else [Normed(nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)))]
    layers = [nnx.Embed(TOKENS, WIDTH, rngs=nnx.Rngs(0)), *others, Normed(norm), Normed(norm)]
    a, b = len(others) + 1, len(others) + 2
    message = rf"layers/{a} \(Normed\) writes to layers/{a}/norm/mean, the same variable as layers/{b}/norm/mean"
    with pytest.raises(ValueError, match=message):
        Trainer(
            layers,
            loss,
            optax.sgd(0.1),
            batch=batches(1)[0],
            mesh=make_mesh(len(layers)),
            pipeline=PipelineConfig(num_microbatches=1),
        )


def test_statistics_that_stay_and_random_streams_may_be_shared() -> None:
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs)
    drop = nnx.Dropout(0.5, rngs=rngs)
    layers = [nnx.Embed(TOKENS, WIDTH, rngs=rngs), Normed(norm), drop, Normed(norm), drop, nnx.Linear(4, 8, rngs=rngs)]
    trainer = trainer_of(layers)
    trainer.check(trainer.step(batches(1)[0]))
    assert [group[0] for group in trainer.model.tied] == ["layers/1/norm/bias", "layers/1/norm/scale"]


def test_verify_takes_shared_layers_and_finds_them_untied(monkeypatch: pytest.MonkeyPatch) -> None:
    def report() -> bool:
        return verify(
            embed_and_head(),
            loss,
            optax.sgd(0.5),
            batches=batches(2),
            mesh=make_mesh(2),
            pipeline=PipelineConfig(num_microbatches=2),
        ).ok

    assert report()
    monkeypatch.setattr(TiedLeaves, "share_values", lambda self, params: dict(params))
    assert not report()


def test_leaves_that_came_apart_before_they_were_tied_are_made_one() -> None:
    trainer = trainer_of(embed_and_head())
    trees = trainer.state_tree()
    trees[1]["params"]["layers/2/table/embedding"] += 1
    trainer.load_state_tree(trees, 0)
    np.testing.assert_array_equal(trainer.params["layers/2/table/embedding"], trainer.params["layers/0/embedding"])
