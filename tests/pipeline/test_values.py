"""Values that go past stages: their gradients, the same whatever the schedule, and what has none."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from meshpipe import PipelineConfig, Trainer, make_mesh, named, reading
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.layer import Leaves
from meshpipe.layers.wiring import wire
from meshpipe.plan.lower import Transfer
from meshpipe.plan.plan import Op
from meshpipe.reference.layered import LayeredModel
from meshpipe.sharding import PRESETS
from meshpipe.stage.jaxpr import DERIVATIVE_PRIMITIVES
from meshpipe.stage.target import ACCELERATOR, Target

WIDTH, ROWS, MICROBATCHES = 4, 8, 4
RNG = np.random.default_rng(0)
BATCH = {name: RNG.normal(size=(ROWS, WIDTH)).astype(np.float32) for name in ("inputs", "targets")}


class Dense(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(0.5 * rngs.params.normal((WIDTH, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(x @ self.kernel[...])


class Encode(Dense):
    """A memory of several leaves, one of which are integers."""

    def __call__(self, x: jax.Array) -> Any:
        places = jnp.broadcast_to(jnp.arange(WIDTH) % 3, x.shape)
        return {"keys": super().__call__(x), "values": jnp.sin(x @ self.kernel[...]), "places": places}


class Decode(Dense):
    def __call__(self, x: jax.Array, memory: Any) -> jax.Array:
        return super().__call__(x) + memory["keys"] * x + memory["values"] * memory["places"]


class Add(Dense):
    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        return super().__call__(x + skip)


class Both(Dense):
    """Is called with a batch field alone, and gives the chain's value to a later layer by name."""

    def __call__(self, x: jax.Array, image: jax.Array) -> jax.Array:
        return super().__call__(x) * image


class Places(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.argsort(x)


class Pick(Dense):
    def __call__(self, x: jax.Array, places: jax.Array) -> jax.Array:
        return super().__call__(jnp.take_along_axis(x, places, 1))


def loss(output: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, int]:
    return (output**2).sum(), output.size


def contrast(output: jax.Array, batch: Mapping[str, jax.Array], image: jax.Array) -> tuple[jax.Array, int]:
    return (jnp.tanh(output) * image).sum(), output.size


MODELS: dict[str, tuple[list[Any], Any]] = {
    "a skip over two stages": ([named("skip", Dense), Dense, Dense, Add], loss),
    "an encoder-decoder": (
        [Dense, named("memory", Encode), reading("targets", Decode), Decode],
        loss,
    ),
    "a value that only the loss reads": ([named("image", Dense), reading("targets", Dense), Dense, Dense], contrast),
    "two skips into one stage": (
        [named("skip", Dense), named("image", Dense), reading("skip", Both), Add],
        loss,
    ),
    "integers": ([Dense, named("places", Places), reading("targets", Dense), Pick], loss),
}


def trainer(model: str, mesh: Any, target: Target | None = None, **pipeline: Any) -> Trainer:
    layers, of_model = MODELS[model]
    config = PipelineConfig(**{"num_microbatches": MICROBATCHES} | pipeline)
    return Trainer(layers, of_model, optax.sgd(0.1), batch=BATCH, mesh=mesh, pipeline=config, target=target)


def bits(trainer: Trainer) -> dict[str, bytes]:
    found, gradients = trainer.loss_and_gradients(BATCH)
    return {"loss": np.asarray(found).tobytes()} | {k: np.asarray(v).tobytes() for k, v in gradients.items()}


def plain(model: str, params: Leaves, state: Leaves | None = None) -> tuple[Any, Leaves]:
    """The loss and its gradients without stages."""
    layers, of_model = MODELS[model]
    abstract = abstract_layers(layers, BATCH)
    wiring = wire(abstract, of_model, None, input="inputs", fields=BATCH)
    whole = LayeredModel(abstract, wiring, seed=0, tied=())

    first = jax.devices()[0]

    def mean(params: Leaves) -> jax.Array:
        inputs, _ = whole.run(
            params,
            jax.device_put(dict(state or {}), first),
            BATCH,
            (jnp.zeros(2, jnp.uint32), jnp.uint32(0), jnp.uint32(0)),
        )
        total, weight = of_model(inputs.output, BATCH, **inputs.named)
        return total / weight

    return jax.value_and_grad(mean)(jax.device_put(params, first))


QUICK = {"an encoder-decoder", "integers"}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, bytes]]:
    """By model, the bits of loss and gradients with one schedule."""
    return {}


@pytest.mark.parametrize("model", [name if name in QUICK else slow(name) for name in MODELS])
def test_gradients_are_those_without_stages(model: str, found: dict[str, dict[str, bytes]]) -> None:
    made = trainer(model, make_mesh(4))
    total, gradients = made.loss_and_gradients(BATCH)
    expected, of_plain = plain(model, made.params)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert set(gradients) == set(of_plain)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, of_plain[path], rtol=1e-4, atol=1e-6, err_msg=path)
    found[model] = bits(made)


SCHEDULES = [
    (4, {"schedule": "gpipe"}),
    (4, {"schedule": "zb-h1", "remat": "full"}),
    (2, {"schedule": "interleaved-1f1b"}),
    (2, {"schedule": "zb-v"}),
    (2, {"schedule": "dualpipe-v"}),
    (1, {"schedule": "gpipe", "stages_per_rank": 4}),
]


@pytest.mark.parametrize(
    ("model", "ranks", "pipeline"),
    [
        (model, *of_plan) if model == "an encoder-decoder" and of_plan[0] == 2 else slow(model, *of_plan)
        for model in MODELS
        for of_plan in SCHEDULES
    ],
)
def test_all_schedules_give_the_same(
    model: str, ranks: int, pipeline: dict[str, Any], found: dict[str, dict[str, bytes]]
) -> None:
    made = trainer(model, make_mesh(ranks), **pipeline)
    assert made.plan.num_stages == 4
    expected, got = found.setdefault(model, bits(trainer(model, make_mesh(4)))), bits(made)
    if any(action.op is Op.BACKWARD_INPUT for action in made.plan.actions):  # other programs compute the gradients
        numbers = (np.concatenate([np.frombuffer(v, np.float32) for v in of.values()]) for of in (got, expected))
        np.testing.assert_allclose(*numbers, rtol=1e-5, atol=1e-7)
    else:
        assert got == expected


@pytest.mark.parametrize("remat", [slow("full"), "layer", slow("nothing_saveable")])
def test_one_program_for_forward_and_backward_of_the_last_stage(remat: str) -> None:
    """As on accelerators; what the last stage reads comes from two stages."""
    model = "two skips into one stage"
    made = trainer(model, make_mesh(2), ACCELERATOR, remat=remat)
    assert made.model.programs[1].forward_backward is not None
    total, gradients = made.loss_and_gradients(BATCH)
    expected, of_plain = plain(model, made.params)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, of_plain[path], rtol=1e-4, atol=1e-6, err_msg=path)


class Table(nnx.Module):
    """Has nothing to train."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Variable(rngs.params.normal((WIDTH, WIDTH)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ self.table[...])


FROZEN = [Table, named("skip", Table), Dense, Add, Table, Dense]


@pytest.mark.parametrize("schedule", [slow("1f1b"), "zb-h1"])
def test_stages_before_the_first_that_is_trained_have_no_backward(schedule: str) -> None:
    MODELS["frozen"] = (FROZEN, loss)
    made = trainer("frozen", make_mesh(6), schedule=schedule)
    total, gradients = made.loss_and_gradients(BATCH)
    for s in (0, 1):
        stage, programs = made.model.traced[s], made.model.programs[s]
        assert not stage.pullback_vars
        assert not stage.residuals
        assert programs.backward is programs.split is programs.recompute is None
        assert len(stage.forward(outputs=True, residuals=True).jaxpr.outvars) == 1  # the value
        # The derivative of `gelu` is not traced either: a function that brings its own is inlined.
        assert {e.primitive.name for e in stage.closed.jaxpr.eqns}.isdisjoint(DERIVATIVE_PRIMITIVES | {"transpose"})
    # The third and fourth read values of stages without a backward, and return no gradient for them.
    hands_back = {s: sum(map(len, stage.x_gradients)) for s, stage in made.model.traced.items()}
    assert hands_back == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    # The fifth is not trained, and hands on the gradient of its input.
    assert made.model.programs[4].split is None
    moved = {str(i).split(" -> ")[1] for i in made.model.lowered.instructions if isinstance(i, Transfer)}
    assert {name for name in moved if name.startswith("dy")} == {f"dy{s}.{m}" for s in (2, 3, 4) for m in range(4)}
    expected, of_plain = plain("frozen", made.params, made.state)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert set(gradients) == set(of_plain) == {"layers/2/kernel", "layers/3/kernel", "layers/5/kernel"}
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, of_plain[path], rtol=1e-4, atol=1e-6, err_msg=path)


@pytest.mark.usefixtures("without_the_cache_of_jax")
def test_stages_of_one_kind_share_a_trace_whatever_they_read() -> None:
    """Decoder layers that read the same memory; only the first is called with a field, only the last has a loss."""
    layers = [named("memory", Encode), reading("targets", Decode), Decode, Decode, Decode]
    MODELS["decoder"] = (layers, loss)
    made = trainer("decoder", make_mesh(5))
    assert [stage.original is not None for stage in made.model.traced.values()] == [False, False, False, True, False]
    total, gradients = made.loss_and_gradients(BATCH)
    expected, of_plain = plain("decoder", made.params)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients["layers/0/kernel"], of_plain["layers/0/kernel"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sharding", [slow("replicated"), "fully-sharded"])
def test_values_are_split_over_data_and_tensor_devices(sharding: str) -> None:
    class Split(Decode):
        def __init__(self, rngs: nnx.Rngs):
            kernel = rngs.params.normal((WIDTH, WIDTH))
            self.kernel = nnx.Param(0.5 * kernel, out_sharding=("embed", "hidden"))

    MODELS[sharding] = ([named("memory", Encode), reading("targets", Split), Split, Split], loss)
    layers, of_model = MODELS[sharding]
    config = PipelineConfig(num_microbatches=2, schedule="interleaved-1f1b")
    made = Trainer(
        layers,
        of_model,
        optax.sgd(0.1),
        batch=BATCH,
        mesh=make_mesh(2, 2, 2),
        pipeline=config,
        rules=PRESETS[sharding],
    )
    total, gradients = made.loss_and_gradients(BATCH)
    expected, of_plain = plain(sharding, made.params)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, of_plain[path], rtol=1e-4, atol=1e-6, err_msg=path)


def test_evaluation_and_prediction_follow_the_values_that_they_read() -> None:
    def metrics(output: jax.Array, batch: Any, skip: jax.Array) -> Any:
        return {"skip": (skip.sum(), skip.size)}

    layers = [named("skip", Dense), named("image", Dense), Add, Dense]
    config = PipelineConfig(num_microbatches=MICROBATCHES)
    made = Trainer(layers, contrast, optax.sgd(0.1), metrics=metrics, batch=BATCH, mesh=make_mesh(4), pipeline=config)
    graphs = made.plan.graph, made.model.evaluation.graph, made.model.prediction.graph
    assert [[str(value) for value in graph.values] for graph in graphs] == [
        ["skip 0 -> 1 2", "image 1 -> 2 3", "2 -> 3"],
        ["skip 0 -> 1 2 3", "image 1 -> 2 3", "2 -> 3"],
        ["skip 0 -> 1 2", "image 1 -> 2", "2 -> 3"],
    ]
    kernels = [np.asarray(made.params[f"layers/{i}/kernel"]) for i in range(4)]
    skip = np.tanh(BATCH["inputs"] @ kernels[0])
    image = np.tanh(skip @ kernels[1])
    output = np.tanh(np.tanh((image + skip) @ kernels[2]) @ kernels[3])
    rows = slice(0, 5)  # two microbatches and a half
    means = made.evaluate([{name: value[rows] for name, value in BATCH.items()}])
    assert means == {
        "loss": pytest.approx((np.tanh(output) * image)[rows].mean(), rel=1e-5),
        "skip": pytest.approx(skip[rows].mean(), rel=1e-5),
    }
    np.testing.assert_allclose(made.predict({"inputs": BATCH["inputs"]}), output, rtol=1e-5, atol=1e-6)
