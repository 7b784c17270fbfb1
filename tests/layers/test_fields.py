"""A call gets the batch fields that its author meant, and says which of them it could do without."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh, with_fields
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.layer import LayerLike
from meshpipe.layers.notes import notes_on

WIDTH = 8
FIELDS = ("inputs", "mask", "keep", "rngs", "inputs_k", "y", "index", "carry")


class Own(nnx.Module):
    def __call__(self, x: jax.Array, y: jax.Array, *, mask: jax.Array | None = None, other: int = 0) -> jax.Array:
        return x


class Derived(nnx.LayerNorm):
    """Its call is Flax's."""


class Overridden(nnx.LayerNorm):
    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return super().__call__(x)


def fields(layer: LayerLike) -> dict[str, str]:
    return dict(abstract_layers([layer], FIELDS)[0].fields)


@pytest.mark.parametrize(
    "layer",
    [
        lambda rngs: nnx.BatchNorm(WIDTH, rngs=rngs),
        lambda rngs: nnx.LayerNorm(WIDTH, rngs=rngs),
        lambda rngs: nnx.RMSNorm(WIDTH, rngs=rngs),
        lambda rngs: nnx.GroupNorm(WIDTH, num_groups=2, rngs=rngs),
        lambda rngs: nnx.InstanceNorm(WIDTH, rngs=rngs),
        lambda rngs: nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False),
        lambda rngs: nnx.Dropout(0.5, rngs=rngs),
        lambda rngs: Derived(WIDTH, rngs=rngs),
    ],
)
def test_calls_of_flax_get_no_field_by_name(layer: LayerLike) -> None:
    assert fields(layer) == {}


def test_calls_of_the_user_get_fields_by_name_and_optional_ones_are_told() -> None:
    assert fields(Own) == {"y": "y", "mask": "mask"}
    assert fields(lambda rngs: Overridden(WIDTH, rngs=rngs)) == {"mask": "mask"}
    layers = abstract_layers([Own, Own, lambda rngs: Overridden(WIDTH, rngs=rngs)], FIELDS)
    assert notes_on(layers) == (
        "Batch fields given to optional keywords of the same name: mask of Own (layers/0, layers/1).",
        "Batch fields given to optional keywords of the same name: mask of Overridden (layers/2).",
    )


def test_fields_that_are_asked_for_are_all_that_is_given() -> None:
    norm = nnx.LayerNorm(WIDTH, rngs=nnx.Rngs(0))
    assert fields(with_fields(norm, mask="keep")) == {"mask": "keep"}
    assert fields(with_fields(Own, y="y")) == {"y": "y"}
    layers = abstract_layers([with_fields(Own, y="y", mask="mask")] * 2, FIELDS)
    assert notes_on(layers) == ()
    assert [layer.path for layer in layers] == ["layers/0", "layers/1"]


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            with_fields(Own, y="z"),
            r"must name fields of the batch or named outputs. Got 'z' for layers/0 \(Own\); the batch has inputs",
        ),
        (with_fields(Own, y="y", musk="mask"), r"Got 'musk' for layers/0 \(Own\), which takes mask, other, y"),
        (
            with_fields(Own),
            r"layers/0 \(Own\) requires 'y'; .* Ask for it: meshpipe.with_fields\(layer, y='y'\)",
        ),
        (
            lambda rngs: nnx.LSTMCell(WIDTH, WIDTH, rngs=rngs),
            r"\(LSTMCell\) requires 'inputs'; .*\.with_fields\(layer, inputs='inputs'\)",
        ),
    ],
)
def test_what_is_not_there_is_refused(layer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fields(layer)


def test_the_name_of_a_field_of_the_loss_changes_nothing() -> None:
    inputs = np.random.default_rng(0).normal(size=(16, WIDTH)).astype(np.float32)
    found = {}
    asked = with_fields(lambda rngs: nnx.BatchNorm(WIDTH, rngs=rngs), mask="mask")
    for name, norm in (("keep", asked.layer), ("mask", asked.layer), ("asked", asked)):
        field = "mask" if name == "asked" else name
        batch = {"inputs": inputs, field: (np.arange(16) % 3 > 0)[:, None]}

        def loss(output: jax.Array, batch: Any, field: str = field) -> Any:
            return (output**2 * batch[field]).sum(), batch[field].sum()

        trainer = Trainer(
            [norm],
            loss,
            optax.sgd(0.1),
            batch=batch,
            mesh=make_mesh(1),
            pipeline=PipelineConfig(num_microbatches=1),
        )
        found[name] = float(trainer.step(batch).loss)
    assert found["keep"] == found["mask"] != found["asked"]
