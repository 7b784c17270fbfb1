"""What layers, loss and metrics read: batch fields and named outputs, found from the list of layers alone."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import meshpipe.layers.staged_model
from meshpipe import Trainer, call, make_mesh, named, reading, sows, verify, with_fields
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.fields import LayerCall
from meshpipe.layers.notes import notes_on
from meshpipe.layers.stage_wiring import Received, StageWiring, cut_wiring
from meshpipe.layers.wiring import Field, Output, Wiring, wire
from meshpipe.plan.graph import Value, chain

WIDTH = 4
FIELDS = ("inputs", "targets", "weight")


def dense(rngs: nnx.Rngs) -> nnx.Module:
    return nnx.Linear(WIDTH, WIDTH, rngs=rngs)


class Decoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, memory: jax.Array) -> jax.Array:
        return self.linear(x) + memory


class Perhaps(nnx.Module):
    def __call__(self, x: jax.Array, memory: Any = None, weight: Any = None) -> jax.Array:
        return x if memory is None else x + memory


class Sowing(Decoder):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(nnx.Intermediate, "features", x)
        return self.linear(x)


def loss(output: jax.Array, batch: Any) -> Any:
    return (output**2).sum(), output.size


def two_towers(output: jax.Array, batch: Any, image: jax.Array, scale: float = 2.0) -> Any:
    return (output * image).sum() * scale, output.size


def wiring(layers: Any, loss: Any = loss, metrics: Any = None) -> Wiring:
    return wire(abstract_layers(layers, FIELDS), loss, metrics, input="inputs", fields=FIELDS)


ENCODER_DECODER: list[Any] = [dense, named("memory", dense), reading("targets", dense), Decoder, nnx.relu, Decoder]


def test_an_encoder_decoder() -> None:
    found = wiring(ENCODER_DECODER)
    before = [Field("inputs"), Output(0), Field("targets"), *map(Output, (2, 3, 4))]
    assert list(found.inputs) == before
    assert [dict(given) for given in found.keywords] == [{}, {}, {}, {"memory": Output(1)}, {}, {"memory": Output(1)}]
    assert (found.names, found.output, found.fields) == ({Output(1): "memory"}, Output(5), {"inputs", "targets"})


@pytest.mark.parametrize(
    ("entry", "read"),
    [
        (Decoder, {"memory": "memory"}),
        (with_fields(Decoder, memory="memory"), {"memory": "memory"}),
        (call(nnx.relu, lambda relu, x, memory: relu(x) + memory), {"memory": "memory"}),
        (lambda x, memory: x + memory, {"memory": "memory"}),
        (with_fields(lambda x, skip: x + skip, skip="memory"), {"skip": "memory"}),
        (functools.partial(lambda x, memory, scale: x + scale * memory, scale=2.0), {"memory": "memory"}),
        (Decoder(rngs=nnx.Rngs(0)), {"memory": "memory"}),
        (with_fields(nnx.MultiHeadAttention(2, WIDTH, rngs=nnx.Rngs(0), decode=False), inputs_k="memory"), None),
    ],
)
def test_a_module_a_constructor_and_a_function_read_by_their_parameters(entry: Any, read: Any) -> None:
    layer = abstract_layers([named("memory", dense), entry], FIELDS)[1]
    assert dict(layer.fields) == (read or {"inputs_k": "memory"})


@pytest.mark.parametrize("layer", [dense, dense(nnx.Rngs(0)), nnx.relu])
def test_the_ways_to_call_a_layer_combine_in_any_order(layer: Any) -> None:
    def function(module: Any, x: jax.Array, skip: Any) -> jax.Array:
        return module(x) + skip

    steps: list[Callable[[Any], LayerCall]] = [
        lambda given: named("out", given),
        lambda given: reading("targets", given),
        lambda given: with_fields(given, skip="memory"),
        lambda given: call(given, function),
    ]
    made = [functools.reduce(lambda given, step: step(given), order, layer) for order in (steps, steps[::-1])]
    assert made[0] == made[1] == LayerCall(layer, {"skip": "memory"}, function, "out", "targets")


def test_an_optional_keyword_gets_an_output_from_where_it_exists() -> None:
    layers = abstract_layers(
        [Perhaps, named("memory", Perhaps), Perhaps, with_fields(Perhaps, memory="memory")], FIELDS
    )
    assert [dict(layer.fields) for layer in layers] == [
        {"weight": "weight"},
        {"weight": "weight"},
        {"memory": "memory", "weight": "weight"},
        {"memory": "memory"},
    ]
    assert notes_on(layers) == (
        "Batch fields given to optional keywords of the same name: weight of Perhaps (layers/0, layers/1, layers/2).",
        "Named outputs given to optional keywords of the same name: memory of Perhaps (layers/2).",
    )


def test_loss_and_metrics_read_by_their_third_parameters_on() -> None:
    def metrics(output: Any, batch: Any, *, text: Any) -> Any:
        return {}

    layers: list[Any] = [named("image", dense), reading("targets", dense), named("text", nnx.relu)]
    found = wiring(layers, two_towers, metrics)
    assert (dict(found.loss), dict(found.metrics)) == ({"image": Output(0)}, {"text": Output(2)})
    given = wiring([dense, named("image", nnx.relu)], functools.partial(two_towers, scale=1.0))
    assert dict(given.loss) == {"image": Output(1)}


def test_a_cut_says_what_moves_and_what_each_stage_reads() -> None:
    found = cut_wiring(wiring(ENCODER_DECODER), [range(2), range(2, 4), range(4, 6)], (True,) * 3)
    memory, plain = Value("memory", 0, (1, 2)), Value("", 1, (2,))
    assert found.graph.values == (memory, plain)
    assert found.stages == (
        StageWiring((Field("inputs"), Output(0)), ((), ()), (Output(1),)),
        StageWiring((Field("targets"), Output(0)), ((), (("memory", Received(0)),)), (Output(1),)),
        StageWiring((Received(1), Output(0)), ((), (("memory", Received(0)),)), ()),
    )


def test_what_a_layer_sows_is_a_value_beside_its_output() -> None:
    layers = [dense, sows(named("image", Sowing), memory="features"), Decoder, Decoder]
    found = wiring(layers, two_towers)
    assert found.names == {Output(1): "image", Output(1, "features"): "memory"}
    cut = cut_wiring(found, [range(2), range(2, 3), range(3, 4)], (True,) * 3)
    image, memory, plain = Value("image", 0, (1, 2)), Value("memory", 0, (1, 2)), Value("", 1, (2,))
    assert cut.graph.values == (image, memory, plain)
    assert cut.stages[0].outputs == (Output(1), Output(1, "features"))


def test_a_plain_list_is_a_chain_and_its_inner_stages_are_equal() -> None:
    found = cut_wiring(wiring([dense] * 8), [range(i, i + 2) for i in range(0, 8, 2)], (True,) * 4)
    assert found.graph == chain(4)
    assert found.stages[1] == found.stages[2]


def test_what_only_loss_or_metrics_read_moves_only_for_them() -> None:
    def metrics(output: Any, batch: Any, early: Any) -> Any:
        return {}

    found = wiring([named("early", dense), named("image", dense), dense, dense], two_towers, metrics)
    cuts = [range(i, i + 1) for i in range(4)]

    def targets(**of: bool) -> list[tuple[str, tuple[int, ...]]]:
        return [(value.name, value.targets) for value in cut_wiring(found, cuts, (True,) * 4, **of).graph.values]

    assert targets() == [("early", (1,)), ("image", (2, 3)), ("", (3,))]
    assert targets(metrics=True) == [("early", (1, 3)), ("image", (2, 3)), ("", (3,))]
    assert targets(loss=False) == [("early", (1,)), ("image", (2,)), ("", (3,))]


def needs_image(output: Any, batch: Any, image: Any) -> Any:
    return loss(output, batch)


def needs_field(output: Any, batch: Any, weight: Any) -> Any:
    return loss(output, batch)


def by_position(output: Any, batch: Any, memory: Any, /) -> Any:
    return loss(output, batch)


MEMORY = named("memory", dense)
WRONG: dict[str, tuple[Callable[[], list[Any]], dict[str, Any], str]] = {
    "a batch field": (
        lambda: [dense, named("targets", dense), dense],
        {},
        "A name must be that of a batch field or of an output, not of both. An output of layers/1 is named 'targets', "
        "which is a field of the batch. Choose another name.",
    ),
    "twice": (
        lambda: [MEMORY, Decoder, MEMORY, Decoder],
        {},
        "Every named output must have a name of its own. Got 'memory' for those of layers/0 and layers/2. Rename one.",
    ),
    "two names": (
        lambda: [named("keys", MEMORY), Decoder],
        {},
        "An output has one name. Got 'keys' for an output that is named 'memory'. Readers may call it as they like: "
        "with_fields(layer, keys='memory').",
    ),
    "before it exists": (
        lambda: [dense, Decoder, MEMORY, Decoder],
        {},
        "A named output must exist before it is read. layers/1 (Decoder) reads 'memory', the output of layers/2. Put "
        "the layer that makes it first, or give the parameter a default, which is used where it does not exist.",
    ),
    "its own": (
        lambda: [dense, named("memory", Decoder), dense],
        {},
        "A named output must exist before it is read. layers/1 (Decoder) reads 'memory', the output of layers/1. Put",
    ),
    "asked for before it exists": (
        lambda: [with_fields(Perhaps, memory="memory"), MEMORY, Decoder],
        {},
        "A named output must exist before it is read. layers/0 (Perhaps) reads 'memory', the output of layers/1. Put",
    ),
    "called with before it exists": (
        lambda: [named("early", dense), reading("memory", dense), MEMORY, Decoder],
        {"loss": lambda output, batch, early: loss(output, batch)},
        "A named output must exist before it is read. layers/1 (Linear) reads 'memory', the output of layers/2. Put",
    ),
    "never": (
        lambda: [dense, MEMORY, dense],
        {},
        "A named output must be read by name. Got 'memory', the output of layers/1 (Linear), which no layer after it, "
        "nor loss, nor metrics ask for. Give a call a parameter 'memory', ask for it with "
        "meshpipe.with_fields(layer, keyword='memory'), or drop the name.",
    ),
    "dropped": (
        lambda: [dense, dense, reading("targets", dense)],
        {},
        "Every output must be used. That of layers/1 (Linear) is not: layers/2 (Linear) reads 'targets' in its place. "
        "Name it, meshpipe.named(name, layer), and let a later layer or the loss ask for it by that name; or drop the "
        "layer.",
    ),
    "unknown input": (
        lambda: [dense, MEMORY, reading("tagrets", Decoder)],
        {},
        "A layer must read a field of the batch, or a named output. Got 'tagrets' for layers/2 (Decoder); the batch "
        "has inputs, targets, weight, and the named outputs before it are memory.",
    ),
    "unknown field": (
        lambda: [MEMORY, with_fields(Decoder, memory="memroy")],
        {},
        "with_fields must name fields of the batch or named outputs. Got 'memroy' for layers/1 (Decoder); the batch "
        "has inputs, targets, weight, and the named outputs before it are memory.",
    ),
    "unknown keyword": (
        lambda: [MEMORY, with_fields(Decoder, kv="memory")],
        {},
        "with_fields must name parameters of the layer's __call__ after its input. Got 'kv' for layers/1 (Decoder), "
        "which takes memory.",
    ),
    "required, and of no layer": (
        lambda: [dense, Decoder],
        {},
        "After its input, a layer's __call__ may only require batch fields, named outputs, `train` and `rngs`. "
        "layers/1 (Decoder) requires 'memory'; the batch has inputs, targets, weight. Add the field or give it a "
        "default.",
    ),
    "the loss asks for none": (
        lambda: [MEMORY, Decoder],
        {"loss": needs_image},
        "After output and microbatch, the loss may only require named outputs. Got the parameter 'image'; named "
        "outputs are memory. Name it: meshpipe.named('image', layer), or give the parameter a default.",
    ),
    "the loss asks for a field": (
        lambda: [dense],
        {"loss": needs_field},
        "After output and microbatch, the loss may only require named outputs. Got the parameter 'weight'; no output "
        "has a name. Read the batch field from the microbatch: microbatch['weight'].",
    ),
    "the loss asks by position": (
        lambda: [MEMORY, Decoder],
        {"loss": by_position},
        "After output and microbatch, the loss may only require named outputs. Got the parameter 'memory'; named "
        "outputs are memory. It is given by keyword: drop the / after it.",
    ),
    "another first input": (
        lambda: [reading("targets", dense)],
        {},
        "The first layer is called with the batch field that `input` names. Got input='inputs' and "
        "reading('targets', ...) for layers/0 (Linear). Pass input='targets'.",
    ),
    "two inputs": (
        lambda: [dense, reading("weight", reading("targets", dense))],
        {},
        "A layer is called with one input. Got reading('weight', ...) of a layer that reads 'targets'. For a second "
        "one, give its call a parameter of that name.",
    ),
    "no identifier": (
        lambda: [named("the memory", dense), Decoder],
        {},
        "The name of an output must be one that a parameter can have. Got 'the memory'. Write e.g. "
        "named('memory', layer).",
    ),
    "what is sown has the name of an output": (
        lambda: [MEMORY, sows(Sowing, memory="features"), Decoder],
        {},
        "Every named output must have a name of its own. Got 'memory' for those of layers/0 and layers/1. Rename one.",
    ),
    "what is sown is read by nobody": (
        lambda: [dense, sows(Sowing, "features"), dense],
        {},
        "A named output must be read by name. Got 'features', sown by layers/1 (Sowing), which no layer after it, nor "
        "loss, nor metrics ask for.",
    ),
    "sows without names": (lambda: [sows(Sowing)], {}, "sows takes a layer, then names. Got no name. Write e.g."),
    "sows one name twice": (
        lambda: [sows(sows(Sowing, "features"), features="other")],
        {},
        "sows must name each value once. Got 'features' twice. Leave one out, or rename it.",
    ),
    "sows no identifier": (
        lambda: [sows(Sowing, "the features")],
        {},
        "The name of an output must be one that a parameter can have. Got 'the features'. Write e.g. "
        "sows(layer, 'features').",
    ),
    "the name of a mode": (
        lambda: [named("train", dense), Decoder],
        {},
        "An output must not be named 'train': by that parameter, calls ask for their mode or a random stream. Choose "
        "another name.",
    ),
}


def train(layers: Any, loss: Any = loss) -> None:
    Trainer(layers, loss, optax.sgd(0.1), batch=rows(), mesh=make_mesh(1))


def compare(layers: Any, loss: Any = loss) -> None:
    verify(layers, loss, optax.sgd(0.1), batches=[rows()], mesh=make_mesh(1))


def rows() -> dict[str, np.ndarray]:
    return {name: np.ones((4, WIDTH), np.float32) for name in FIELDS}


@pytest.mark.parametrize("use", [train, compare])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_graphs_are_refused_before_anything_is_traced(name: str, use: Any, monkeypatch: Any) -> None:
    def traced(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a stage was traced")

    monkeypatch.setattr(meshpipe.layers.staged_model, "TracedStage", traced)
    layers, arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        use(layers(), **arguments)


def test_metrics_may_only_require_named_outputs() -> None:
    with pytest.raises(ValueError, match=r"the metrics may only require named outputs. Got the parameter 'image'"):
        wiring([dense], loss, needs_image)
