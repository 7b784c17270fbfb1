"""What processes compare before the first transfer, and how they say what differs."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh
from meshpipe.run import agreement
from meshpipe.run.agreement import agree, describe_step, differences

WIDTH = 8


def trainer(*, microbatches: int = 2, width: int = WIDTH, optimizer: Any = None, data: int = 1) -> Trainer:
    return Trainer(
        [lambda rngs: nnx.Linear(WIDTH, width, rngs=rngs), lambda rngs: nnx.Linear(width, WIDTH, rngs=rngs)],
        lambda output, batch: (output.sum(), output.size),
        optimizer or optax.sgd(0.1),
        batch={"inputs": np.ones((16, WIDTH), np.float32)},
        mesh=make_mesh(2, data),
        pipeline=PipelineConfig(num_microbatches=microbatches),
    )


@pytest.fixture(scope="module")
def described() -> dict[str, str]:
    return describe_step(trainer())


def test_equal_processes_describe_the_same(described: dict[str, str]) -> None:
    assert described == describe_step(trainer())
    assert differences([described] * 3) == []
    assert described["version of jax"] == jax.__version__
    assert described["batch"] == "inputs float32[16, 8]"


@pytest.mark.parametrize(
    ("other", "names"),
    [
        ({"microbatches": 4}, {"plan", "instructions", "values from stage 0 to 1"}),
        (
            {"width": 4},
            {"values from stage 0 to 1", "parameters and state of stage 0", "parameters and state of stage 1"},
        ),
        ({"optimizer": optax.adam(0.1)}, {"parameters and state of stage 0", "parameters and state of stage 1"}),
        ({"data": 2}, {"mesh", "devices", "instructions"}),
    ],
)
def test_what_differs_is_named(other: dict[str, Any], names: set[str], described: dict[str, str]) -> None:
    found = describe_step(trainer(**other))
    assert found.keys() == described.keys()
    assert {name for name in found if found[name] != described[name]} == names


def test_the_sentence_says_both_values_where_people_can_read_them(described: dict[str, str]) -> None:
    other = described | {"version of jax": "0.0.1", "instructions": "#0"}
    assert differences([described, described, other]) == [
        f"process 2 has another version of jax (0.0.1, not {jax.__version__}), instructions"
    ]


def test_neighbours_that_process_0_knows_nothing_of_are_compared_with_each_other() -> None:
    boundary = "values from stage 1 to 2"
    assert differences([{}, {boundary: "#1"}, {boundary: "#2"}]) == [
        "process 2 has another values from stage 1 to 2 than process 1"
    ]


def test_every_process_hears_of_a_difference(monkeypatch: pytest.MonkeyPatch, described: dict[str, str]) -> None:
    told = {"meshpipe/agreement/1": agreement.json.dumps(described | {"mesh": "another"})}
    monkeypatch.setattr(agreement, "process_count", lambda: 2)
    monkeypatch.setattr(agreement, "tell", told.__setitem__)
    monkeypatch.setattr(agreement, "ask", lambda key, timeout: told[key])
    with pytest.raises(ValueError, match=r"process 1 has another mesh \(another, not pipeline 2 x data 1"):
        agree(trainer())
    assert "another" in told["meshpipe/agreement"]
