"""Groups of parameters with a learning rate, weight decay or optimizer of their own."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from meshpipe import OptimizerConfig, ParameterGroup
from meshpipe.optimizer.patterns import matches

PARAMS = {
    f"layers/{layer}/{name}": jnp.ones(shape) for layer in (0, 1) for name, shape in (("kernel", (2, 2)), ("bias", 2))
}


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("layers/1", "layers/1/kernel", True),
        ("layers/1", "layers/10/kernel", False),
        ("layers/1", "layers/0/layers/1/kernel", False),
        ("layers/*/kernel", "layers/3/dense/kernel", True),
        ("bias", "layers/3/dense/bias", True),
        ("bias", "layers/3/debias", False),
        ("attention/*", "layers/3/attention/query/kernel", True),
        ("*lora*", "layers/3/query/lora_a", True),
        ("layers/[01]", "layers/1/kernel", True),
        ("*", "layers/1/kernel", True),
    ],
)
def test_a_pattern_matches_whole_components(pattern: str, path: str, expected: bool) -> None:
    assert matches(pattern, path) is expected


def test_each_group_moves_as_if_it_were_alone() -> None:
    config = OptimizerConfig(
        learning_rate=0.1,
        weight_decay=0.5,
        groups=("layers/0/kernel:learning_rate=0.01", "bias:optimizer=sgd,learning-rate=1", "layers/0:weight_decay=3"),
    )
    gradients = {path: 0.25 * leaf for path, leaf in PARAMS.items()}
    found = moved(config.build(10), PARAMS, gradients)
    alone = {
        "layers/0/kernel": OptimizerConfig(learning_rate=0.01, weight_decay=0.5),
        "layers/0/bias": OptimizerConfig(optimizer="sgd", learning_rate=1.0, weight_decay=0.5),
        "layers/1/kernel": OptimizerConfig(learning_rate=0.1, weight_decay=0.5),
        "layers/1/bias": OptimizerConfig(optimizer="sgd", learning_rate=1.0, weight_decay=0.5),
    }
    for path, own in alone.items():
        (expected,) = moved(own.build(10), {path: PARAMS[path]}, {path: gradients[path]}).values()
        np.testing.assert_array_equal(found[path], expected, err_msg=path)


def moved(transformation: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    updates, _ = transformation.update(gradients, transformation.init(params), params)
    return updates


def test_a_group_prints_as_the_text_that_makes_it() -> None:
    group = ParameterGroup(pattern="layers/0:1", learning_rate=1e-4, optimizer="sgd")
    assert ParameterGroup.parse(str(group)) == group
    assert OptimizerConfig(groups=(str(group),)) == OptimizerConfig(groups=(group,))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (("layers/0",), "is a pattern of leaf paths and what its parameters have of their own"),
        (("layers/0:momentum=1",), "is a pattern of leaf paths"),
        (("layers/0:learning_rate=high",), "is a pattern of leaf paths"),
        (
            ("bias:weight_decay=1", "layers/0:learning_rate=-1"),
            "^The learning_rate of a group of `groups` must be a number of at least 0. Got -1.0 for 'layers/0'",
        ),
        (("bias:weight_decay=inf",), "The weight_decay of a group of `groups` must be .* Got inf for 'bias'"),
        ((":learning_rate=1",), "needs a pattern of leaf paths. Got ''"),
    ],
)
def test_a_wrong_group_is_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        OptimizerConfig(groups=groups)


def test_a_group_that_gets_nothing_is_refused() -> None:
    paths = list(PARAMS)
    OptimizerConfig(groups=("layers/0:learning_rate=1", "bias:weight_decay=0")).check(paths)
    with pytest.raises(ValueError, match=r"Got 'layers/2': it matches none. Trained are layers/0/kernel"):
        OptimizerConfig(groups=("layers/2:learning_rate=1",)).check(paths)
    with pytest.raises(ValueError, match=r"Got 'layers/0/bias': groups before it have all that it matches"):
        OptimizerConfig(groups=("layers/0:learning_rate=1", "layers/0/bias:weight_decay=0")).check(paths)
    with pytest.raises(ValueError, match="must differ from the rest"):
        ParameterGroup(pattern="bias")
