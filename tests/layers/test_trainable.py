"""Which parameters are trained: patterns of leaf paths and NNX filters, and what is wrong with them."""

from typing import Any

import pytest
from flax import nnx

from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.trainable import describe_trained, describe_unused, freeze

WIDTH = 4


def linear(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs)


def adapted(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.LoRALinear(WIDTH, WIDTH, lora_rank=1, rngs=rngs)


def normed(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.BatchNorm(WIDTH, rngs=rngs)


LINEAR = abstract_layers([linear, normed, linear], ("inputs",))
ADAPTED = abstract_layers([adapted, nnx.relu, adapted], ("inputs",))
KERNELS = {"layers/0/kernel", "layers/2/kernel"}
ADAPTERS = {f"layers/{layer}/lora/{name}" for layer in (0, 2) for name in ("lora_a", "lora_b")}


def trained(layers: Any, trainable: Any) -> set[str]:
    frozen = freeze(layers, trainable)
    for before, after in zip(layers, frozen, strict=True):
        assert after.all_params == dict(before.params)
        assert after.own_state == dict(before.state)
        assert after.frozen == before.params.keys() - after.params.keys()
    return {path for layer in frozen for path in layer.params}


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("kernel", KERNELS),
        (["layers/2"], {"layers/2/kernel", "layers/2/bias"}),
        (("layers/0/kernel", "layers/2/kernel"), KERNELS),
        (["!bias", "!scale"], KERNELS),
        (["layers/[02]", "!bias"], KERNELS),
        (lambda path, variable: path[:2] == ("layers", 2) and variable.ndim == 2, {"layers/2/kernel"}),
        (nnx.All(nnx.Param, nnx.PathContains("kernel")), KERNELS),
        ([nnx.PathContains("scale"), "layers/0/bias"], {"layers/1/scale", "layers/0/bias"}),
        (None, {path for layer in LINEAR for path in layer.params}),
        (..., {path for layer in LINEAR for path in layer.params}),
        (nnx.Param, {path for layer in LINEAR for path in layer.params}),
    ],
)
def test_patterns_and_filters_choose_parameters(trainable: Any, expected: set[str]) -> None:
    assert trained(LINEAR, trainable) == expected


def test_a_model_with_adapters_trains_them_alone_unless_told() -> None:
    assert trained(ADAPTED, None) == ADAPTERS
    assert trained(ADAPTED, nnx.LoRAParam) == ADAPTERS
    assert trained(ADAPTED, [nnx.LoRAParam, "layers/2/bias"]) == {*ADAPTERS, "layers/2/bias"}
    assert trained(ADAPTED, True) == {path for layer in ADAPTED for path in layer.params}


@pytest.mark.parametrize(
    ("layers", "trainable", "sentence"),
    [
        (LINEAR, None, "Training all 6 arrays, 48 parameters."),
        (ADAPTED, None, "Training 4 of 8 arrays, 16 of 56 parameters: lora_a, lora_b."),
        (LINEAR, "layers/2", "Training 2 of 6 arrays, 20 of 48 parameters: layers/2."),
        (LINEAR, ["kernel", "layers/0/bias"], "Training 3 of 6 arrays, 36 of 48 parameters: layers/0/bias, "),
    ],
)
def test_one_sentence_says_what_is_trained(layers: Any, trainable: Any, sentence: str) -> None:
    assert describe_trained(freeze(layers, trainable)).startswith(sentence)


@pytest.mark.parametrize(
    ("unused", "sentence"),
    [
        ({"layers/0/kernel", "layers/0/bias"}, "gradients of 2 of these arrays, 20 parameters: layers/0."),
        ({"layers/0/bias", "layers/2/bias", "layers/1/bias"}, "gradients of 3 of these arrays, 12 parameters: bias."),
    ],
)
def test_a_sentence_says_which_gradients_the_optimizer_never_uses(unused: set[str], sentence: str) -> None:
    (found,) = describe_unused(LINEAR, unused)
    assert sentence in found
    assert "Leave them out of `trainable`" in found
    assert describe_unused(LINEAR, set()) == ()


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("layers/7", "Got 'layers/7', which matches none of 6. Parameters are layers/0/bias, layers/0/kernel"),
        (["kernel", "!lora"], "Got '!lora', which matches none"),
        (nnx.BatchStat, "Got BatchStat, which matches none"),  # no parameter
        ([], "must be trained. Got a `trainable` that leaves none: "),
        (False, "Got False, which matches none"),
        (["layers/0", "!layers/0"], "must be trained"),
        (("!*",), "leaves none: '!*'. Parameters are"),
        (("kernel", nnx.Param, "!*"), "leaves none: 'kernel', Param, '!*'. "),
        (nnx.Linear, "Got the class Linear"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(trainable: Any, message: str) -> None:
    with pytest.raises(ValueError, match="trainable") as caught:
        freeze(LINEAR, trainable)
    assert message in str(caught.value)


def test_errors_of_a_filter_say_where_they_come_from() -> None:
    with pytest.raises(TypeError) as caught:
        freeze(LINEAR, lambda path: True)  # type: ignore[arg-type, misc]
    assert "which was called with a path and a variable" in caught.value.__notes__[0]


def test_tied_parameters_are_trained_together() -> None:
    group = ("layers/0/kernel", "layers/2/kernel")
    freeze(LINEAR, "kernel", [group])
    freeze(LINEAR, "bias", [group])
    with pytest.raises(ValueError, match=r"all or none of them must be trained.*has layers/2/kernel, and not layers/0"):
        freeze(LINEAR, "layers/2", [group])


def test_layers_that_train_different_leaves_share_no_trace() -> None:
    first, _, last = freeze(LINEAR, ["layers/0", "layers/2/bias"])
    assert first.kind != last.kind
    first, _, last = freeze(LINEAR, "bias")
    assert first.kind == last.kind
