"""Parallel equals plain for models that are no chains: the same function of the leaves, written by hand."""

import functools
import itertools
from typing import Any

import graph_models
import jax
import numpy as np
import optax
import pytest
from graph_models import MICROBATCHES, MODELS, plain_loss_and_gradients
from test_parallel_equals_plain import LEAF_TOLERANCE, LOSS_TOLERANCE, assert_close

from meshpipe import PipelineConfig, Trainer, make_mesh

UPDATES = 3
ROWS = graph_models.batches(UPDATES)
RANKS = {"gpipe": 4, "1f1b": 4, "zb-h1": 4, "interleaved-1f1b": 2, "zb-v": 2, "dualpipe-v": 2}
"""Every schedule has four stages."""


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9))


def trainer_of(name: str, mesh: Any, **pipeline: Any) -> Trainer:
    model = MODELS[name]
    config = PipelineConfig(num_microbatches=MICROBATCHES, **pipeline)
    return Trainer(model.layers(), model.loss, optimizer(), batch=ROWS[0], mesh=mesh, pipeline=config)


def pipeline(schedule: str, remat: str = "none") -> dict[str, Any]:
    return {"schedule": schedule, "remat": remat, "stages_per_rank": 4 // RANKS[schedule]}


_started: dict[str, dict[str, np.ndarray]] = {}


@functools.cache
def plain(name: str) -> tuple[list[tuple[float, dict[str, np.ndarray]]], dict[str, np.ndarray]]:
    """Losses and gradients of the updates, and the parameters after them, from the first values in `_started`."""
    params: Any = jax.device_put(_started[name])
    state, found = optimizer().init(params), []
    for row in ROWS:
        loss, gradients = plain_loss_and_gradients(MODELS[name], params, row)
        updates, state = optimizer().update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        found.append((float(loss), jax.device_get(gradients)))
    return found, jax.device_get(params)


def compare(name: str, trainer: Trainer) -> None:
    start = jax.device_get(trainer.params)
    same = jax.tree.map(np.array_equal, _started.setdefault(name, start), start)
    assert all(jax.tree.leaves(same)), "first values depend on the layout"
    expected, params = plain(name)
    for row, (loss, gradients) in zip(ROWS, expected, strict=True):
        found_loss, found = trainer.loss_and_gradients(row)
        assert float(found_loss) == pytest.approx(loss, rel=LOSS_TOLERANCE)
        assert_close(found, gradients)
        result = trainer.step(row)
        trainer.check(result)
        assert float(result.loss) == pytest.approx(loss, rel=LOSS_TOLERANCE)
        assert float(result.grad_norm) == pytest.approx(float(optax.global_norm(gradients)), rel=LEAF_TOLERANCE)
    assert_close(trainer.params, params)


QUICK = {
    ("encoder-decoder", "1f1b", 1, "none"),
    ("only the loss", "zb-v", 1, "none"),
    ("block residuals", "interleaved-1f1b", 1, "full"),
}
MATRIX = list(itertools.product(MODELS, RANKS, (1, 2), ("none", "full")))


@pytest.mark.parametrize(
    ("name", "schedule", "data", "remat"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in MATRIX],
)
def test_a_step_is_the_plain_one(name: str, schedule: str, data: int, remat: str) -> None:
    compare(name, trainer_of(name, make_mesh(RANKS[schedule], data), **pipeline(schedule, remat)))


def bits(trainer: Trainer) -> tuple[list[bytes], dict[str, bytes]]:
    scalars = []
    for row in ROWS:
        result = trainer.step(row)
        scalars.append(np.asarray((result.loss, result.grad_norm)).tobytes())
    return scalars, {path: np.asarray(leaf).tobytes() for path, leaf in trainer.params.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_schedules_and_placements_give_the_same_bits(name: str) -> None:
    expected = bits(trainer_of(name, make_mesh(4), **pipeline("1f1b")))
    assert bits(trainer_of(name, make_mesh(4), **pipeline("gpipe"))) == expected
    one = trainer_of(name, make_mesh(1), schedule="gpipe", stages_per_rank=4)
    assert bits(one) == expected
    two = trainer_of(name, make_mesh(2), **pipeline("interleaved-1f1b"))
    assert bits(two) == expected


FUSED = ("block residuals", "only the loss")
"""Models whose last stage computes a layer and the loss in one loop of XLA where forward stores nothing, and may round
otherwise."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_recomputation_gives_the_same_bits(name: str) -> None:
    """Of gradients and parameters always, of the loss where XLA does not fuse it with a layer."""
    kept, kept_params = bits(trainer_of(name, make_mesh(4), **pipeline("1f1b")))
    recomputed, params = bits(trainer_of(name, make_mesh(4), **pipeline("1f1b", "full")))
    assert params == kept_params
    (losses, norms), (expected, expected_norms) = (
        np.frombuffer(b"".join(scalars), np.float32).reshape(-1, 2).T for scalars in (recomputed, kept)
    )
    assert norms.tobytes() == expected_norms.tobytes()
    if name in FUSED:
        np.testing.assert_array_max_ulp(losses, expected, maxulp=MICROBATCHES)
    else:
        assert losses.tobytes() == expected.tobytes()
