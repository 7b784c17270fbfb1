"""Stages that are the same are traced and compiled once, and only those."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from staged import staged

import meshpipe.compiler.compiler
from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.layers.task import Task
from meshpipe.stage.traced import TracedStage

WIDTH = 8
BATCH = {"inputs": np.random.default_rng(0).normal(size=(8, WIDTH)).astype(np.float32)}
CALLS: Counter[Any] = Counter()


def loss(output: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
    return (output**2).sum(), jnp.float32(output.size)


class Dense(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, *, factor: Any = 1.0, activation: Any = jnp.tanh):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.factor, self.activation = factor, activation

    def __call__(self, x: jax.Array) -> jax.Array:
        CALLS[self.factor] += 1
        return x + self.activation(self.linear(x)) * self.factor


class Drop(Dense):
    """Two random streams in one layer, and batch statistics."""

    def __init__(self, rngs: nnx.Rngs):
        super().__init__(rngs)
        self.first, self.second = nnx.Dropout(0.3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(self.first(super().__call__(self.norm(x))))


class Print(Dense):
    def __call__(self, x: jax.Array) -> jax.Array:
        jax.debug.callback(lambda y: None, x.max())
        return super().__call__(x)


def scaled(factor: Any) -> Any:
    return lambda x: jnp.sin(x) * factor


def train(layer: Any, schedule: str = "1f1b", data: int = 1) -> tuple[list[int], dict[str, bytes]]:
    """Which stages were traced, and parameters and state after two steps of four layers."""
    trainer = Trainer(
        [layer] * 4,
        loss,
        optax.sgd(1e-2),
        batch=BATCH,
        mesh=make_mesh(4, data),
        pipeline=PipelineConfig(num_microbatches=2, schedule=schedule),
    )
    for _ in range(2):
        trainer.step(BATCH)
    leaves = {path: np.asarray(leaf).tobytes() for path, leaf in (*trainer.params.items(), *trainer.state.items())}
    return traces(list(trainer.model.traced.values())), leaves


def trace(layers: list[Any]) -> list[int]:
    config = PipelineConfig(num_microbatches=2)
    mesh = make_mesh(len(layers))
    return traces(staged(Task(layers, loss, batch=BATCH), mesh, config).trace())


def traces(stages: list[TracedStage]) -> list[int]:
    """Of every stage, the one whose trace it has."""
    return [(stage.original or stage).spec.index for stage in stages]


@pytest.mark.usefixtures("without_the_cache_of_jax")
def test_equal_stages_train_to_the_same_bits_as_stages_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, leaves = train(Drop, "zb-h1", data=2)
    assert traced == [0, 1, 1, 3]
    monkeypatch.setattr(meshpipe.compiler.compiler, "load", lambda *_: None)
    traced, expected = train(Drop, "zb-h1", data=2)
    assert traced == [0, 1, 2, 3]
    assert leaves == expected


def test_a_stage_that_cannot_be_copied_is_traced_again() -> None:
    traced, leaves = train(Print)
    assert traced == [0, 1, 2, 3]
    assert leaves == train(Dense)[1]


@pytest.mark.parametrize(
    "layer",
    [Dense, Drop, lambda rngs: Dense(rngs, activation=scaled(2.0)), lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs)],
)
def test_equal_stages_share_a_trace(layer: Any) -> None:
    assert trace([layer] * 5) == [0, 1, 1, 1, 4]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (lambda rngs: Dense(rngs, factor=2), lambda rngs: Dense(rngs, factor=3)),
        (lambda rngs: Dense(rngs, factor=1), lambda rngs: Dense(rngs, factor=True)),
        (lambda rngs: Dense(rngs, activation=scaled(2.0)), lambda rngs: Dense(rngs, activation=scaled(3.0))),
        (
            lambda rngs: Dense(rngs, activation=scaled(np.float32(2))),
            lambda rngs: Dense(rngs, activation=scaled(np.float32(3))),
        ),
        (Drop, Dense),
        (
            lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
            lambda rngs: nnx.Linear(WIDTH, WIDTH, param_dtype=jnp.bfloat16, rngs=rngs),
        ),
    ],
    ids=["attribute", "type of an attribute", "closure", "array in a closure", "class", "dtype"],
)
def test_stages_that_differ_are_traced_for_themselves(one: Any, two: Any) -> None:
    assert trace([one, one, two, two, one, one]) == [0, 1, 2, 2, 1, 5]


def test_code_of_equal_layers_runs_once_for_all_middle_stages() -> None:
    CALLS.clear()
    trace([lambda rngs: Dense(rngs, factor=7.0)] * 6)
    assert CALLS[7.0] == 3  # first, middle, last


def test_stages_in_the_middle_read_no_examples() -> None:
    model = staged(
        Task(
            [Dense] * 3,
            lambda output, batch: ((output - batch["goal"]).sum(), jnp.float32(output.size)),
            batch={"inputs": BATCH["inputs"], "goal": BATCH["inputs"]},
        ),
        make_mesh(3),
        PipelineConfig(num_microbatches=2),
    )
    traced = model.trace()
    for stage, read in ((0, range(8)), (1, []), (2, range(8))):
        model.traced = {stage: traced[stage]}  # as in a process that has this one alone
        assert list(model.rows_read()) == list(read)
