"""What every process says of its trainer: the same where all is the same, and by name what is not."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.layers.description import describe_model, describe_programs
from meshpipe.layers.task import Task

WIDTH = 8


def description(*, microbatches: int = 2, width: int = WIDTH, optimizer: Any = None, data: int = 1) -> dict[str, str]:
    """All that is compared of one trainer: of its model before it is compiled, when layers still have their values."""
    found: dict[str, str] = {}
    made = Trainer.of(
        Task(
            [lambda rngs: nnx.Linear(WIDTH, width, rngs=rngs), lambda rngs: nnx.Linear(width, WIDTH, rngs=rngs)],
            lambda output, batch: (output.sum(), output.size),
            batch={"inputs": np.ones((16, WIDTH), np.float32)},
        ),
        optimizer or optax.sgd(0.1),
        mesh=make_mesh(2, data),
        pipeline=PipelineConfig(num_microbatches=microbatches),
        check=lambda model: found.update(describe_model(model)),
    )
    return found | describe_programs(made.model) | made.optimizer.description()


@pytest.fixture(scope="module")
def described() -> dict[str, str]:
    return description()


def test_equal_trainers_describe_the_same(described: dict[str, str]) -> None:
    assert described == description()
    assert described["version of jax"] == jax.__version__
    assert described["batch"] == "inputs float32[16, 8]"
    assert described["numbers in it"] == "-0.1"


BOUNDARY = "values from stage 0 to 1"
UPDATE = {"update of the optimizer"}


def both(what: str) -> set[str]:
    return {f"{what} of stage {s}" for s in (0, 1)}


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"microbatches": 4}, {"plan", "instructions", BOUNDARY}),
        (
            {"width": 4},
            {
                BOUNDARY,
                *(f"{what} of stage {s}" for s in (0, 1) for what in ("parameters and state", "code of the layers")),
            }
            | UPDATE,
        ),
        (
            {"optimizer": optax.adam(0.1)},
            both("optimizer state") | UPDATE | {"numbers in it"},
        ),
        ({"data": 2}, {"mesh", "devices", "instructions"}),
    ],
)
def test_what_differs_is_named(other: dict[str, Any], names: set[str], described: dict[str, str]) -> None:
    found = description(**other)
    assert found.keys() == described.keys()
    assert {name for name in found if found[name] != described[name]} == names
