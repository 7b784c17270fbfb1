"""Outputs of the last layer, and evaluation of batches of any size, equal plain NNX on one device."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh

ROWS = 16
READ = ("inputs", "shift")
"""The fields that layers read; the loss reads the others."""
EPSILON = float(np.finfo(np.float32).eps)
ALLOWED = 64 * EPSILON
"""Relative to the largest value: sums of at most 64 terms, in another order."""

Batch = Mapping[str, Any]


def metrics(output: jax.Array, batch: Batch) -> dict[str, Any]:
    squares = (output**2).sum(-1)
    return {"size": ((squares * batch["weight"]).sum(), batch["weight"].sum()), "mean": (output.sum(), output.size)}


def make(**changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "layers": small_model.LAYERS,
        "loss": small_model.loss,
        "optimizer": optax.adam(1e-2),
        "batch": small_model.batches(1)[0],
        "metrics": metrics,
        "pipeline": PipelineConfig(num_microbatches=2),
    }
    return Trainer(**(arguments | changes))


def config(schedule: str, microbatches: int, stages: int | None = None) -> PipelineConfig:
    return PipelineConfig(num_microbatches=microbatches, schedule=schedule, stages_per_rank=stages)


LAYOUTS: dict[str, Any] = {
    "one device": lambda: {},
    "data and tensor": lambda: {"mesh": make_mesh(2, 2, 2), "pipeline": config("zb-h1", 2)},
    "several stages a rank": lambda: {"mesh": make_mesh(2, 2), "pipeline": config("interleaved-1f1b", 2, 2)},
    "there and back": lambda: {"mesh": make_mesh(2), "pipeline": config("dualpipe-v", 4, 2)},
}


slow = pytest.mark.slow
QUICK = ("data and tensor", "several stages a rank")


@pytest.fixture(scope="module", params=[name if name in QUICK else pytest.param(name, marks=slow) for name in LAYOUTS])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    """One that has been trained, so that batch statistics are not those of the beginning."""
    made = make(**LAYOUTS[request.param]())
    for batch in small_model.batches(3):
        made.step(batch)
    return made


def rows(count: int, first: int = 0) -> dict[str, np.ndarray]:
    (batch,) = small_model.batches(1, 64)
    return {name: value[first : first + count] for name, value in batch.items()}


def plain(trainer: Trainer, batch: Batch) -> jax.Array:
    """The modules with the trained values, called one after the other as anyone would."""
    enter, mix, center, mix_again, leave = trainer.modules()
    value = mix(enter(jnp.asarray(batch["inputs"])), jnp.asarray(batch["shift"]))
    return leave(mix_again(center(value), jnp.asarray(batch["shift"])))


def assert_close(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=ALLOWED * float(np.max(np.abs(expected))))


@pytest.mark.parametrize("count", [ROWS, 5, 37])
def test_predictions_are_those_of_the_layers(trainer: Trainer, count: int) -> None:
    batch = rows(count)
    found = trainer.predict({name: batch[name] for name in READ})
    assert isinstance(found, np.ndarray)
    assert found.shape == (count, 3)
    assert_close(found, plain(trainer, batch))


def test_of_several_batches_each_is_predicted_when_it_is_asked_for(trainer: Trainer) -> None:
    asked = []

    def batches() -> Iterator[Batch]:
        for first in (0, 16, 32):
            asked.append(first)
            yield rows(16 if first < 32 else 3, first)

    found = trainer.predict(batches())
    assert asked == []
    assert_close(next(found), plain(trainer, rows(16)))
    assert asked == [0]
    assert [len(output) for output in found] == [16, 3]


@pytest.mark.parametrize("counts", [[16, 16], [16, 5], [13], [1], [35]])
def test_every_example_counts_once_in_an_evaluation(trainer: Trainer, counts: list[int]) -> None:
    firsts = np.cumsum([0, *counts])
    parts = [rows(count, int(first)) for count, first in zip(counts, firsts[:-1], strict=True)]
    whole = rows(int(firsts[-1]))
    whole["weight"] = whole["weight"] + 0.25  # of the first rows, too
    parts = [{**part, "weight": part["weight"] + np.float32(0.25)} for part in parts]
    found = trainer.evaluate(parts)
    output = np.asarray(plain(trainer, whole), np.float64)
    wide = {name: np.asarray(value, np.float64) for name, value in whole.items()}
    expected = {"loss": small_model.loss(output, wide), **metrics(output, wide)}
    assert list(found) == ["loss", "size", "mean"]
    for name, (total, weight) in expected.items():
        scale = abs(total / weight) if name != "mean" else float(np.abs(output).mean())
        assert found[name] == pytest.approx(float(total) / float(weight), abs=ALLOWED * scale)


def test_a_missing_field_and_an_unknown_one_are_named(trainer: Trainer) -> None:
    with pytest.raises(ValueError, match=r"shift \[examples\]. Got inputs \[4, 8\]\."):
        trainer.predict({"inputs": rows(4)["inputs"]})
    with pytest.raises(ValueError, match="'colour'"):
        trainer.predict({**rows(4), "colour": np.zeros(4)})
    with pytest.raises(ValueError, match="at least one example"):
        trainer.predict(rows(0))
    with pytest.raises(ValueError, match=r"weight \[examples\]"):
        trainer.evaluate([{name: rows(4)[name] for name in READ}])


def test_what_has_no_rows_cannot_be_predicted() -> None:
    class Mean(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            return x.mean()

    made = make(
        layers=[lambda rngs: nnx.Linear(8, 8, rngs=rngs), Mean()], loss=lambda output, batch: (output, 1), metrics=None
    )
    with pytest.raises(ValueError, match=r"one row for each example. Got shape \(\) for a microbatch of 8"):
        made.predict(rows(4))


def test_outputs_of_several_arrays_keep_their_names_and_dtypes() -> None:
    class Two(nnx.Module):
        def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
            return {"class": x.argmax(-1), "scores": x.astype(jnp.bfloat16)}

    def loss(output: dict[str, jax.Array], batch: Batch) -> Any:
        return output["scores"].astype(jnp.float32).sum(), output["class"].size

    made = make(layers=[lambda rngs: nnx.Linear(8, 8, rngs=rngs), Two()], loss=loss, metrics=None, mesh=make_mesh(2, 2))
    found = made.predict(rows(19))
    assert {name: (value.shape, value.dtype.name) for name, value in found.items()} == {
        "class": ((19,), "int32"),
        "scores": ((19, 8), "bfloat16"),
    }
    np.testing.assert_array_equal(found["class"], found["scores"].astype(np.float32).argmax(-1))
