"""Optax over stages equals Optax over the whole model; what cannot be done stage by stage is refused."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe.mesh import make_mesh, submeshes
from meshpipe.optimizer.config import OptimizerConfig
from meshpipe.optimizer.optimizer import Optimizer, parent
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.sharding import replicated

RANKS = submeshes(make_mesh(pipeline=2, tensor=2))
RNG = np.random.default_rng(0)
VALUES = {
    "layers/0/kernel": RNG.normal(size=(4, 6)).astype(np.float32),
    "layers/0/bias": RNG.normal(size=6).astype(np.float32),
    "layers/1/kernel": RNG.normal(size=(6, 2)).astype(np.float32),
    "layers/1/scale": RNG.normal(size=2).astype(np.float32),
}
GRADIENTS = [{k: RNG.normal(size=v.shape).astype(np.float32) for k, v in VALUES.items()} for _ in range(4)]
WEIGHT = 5.0


NO_STATE = {0: (), 1: ()}


def stage(number, borrowed=frozenset()):
    mesh = RANKS[number]
    spec = {2: PartitionSpec(None, "tensor"), 1: PartitionSpec()}
    params = {
        path: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, spec[v.ndim]))
        for path, v in VALUES.items()
        if path.startswith(f"layers/{number}/")
    }
    return StageParameters(mesh, params, {}, borrowed)


def put(values, number):
    return tuple(jax.device_put(values[path], shape.sharding) for path, shape in stage(number).params.items())


def run(transformation, clip_norm=None, gradients=GRADIENTS):
    """Parameters and norms after one update for each of the gradients, each of a mean over WEIGHT elements."""
    stages = [stage(0), stage(1)]
    optimizer = Optimizer(transformation, stages, clip_norm)
    optimizer.compile()
    params = {number: put(VALUES, number) for number in range(2)}
    states = optimizer.init(params)
    norms = []
    for mean in gradients:
        sums = {number: put({k: v * np.float32(WEIGHT) for k, v in mean.items()}, number) for number in range(2)}
        totals = jax.device_put((np.float32(10.0), np.float32(WEIGHT)), replicated(RANKS[1]))
        params, states, _, (loss, norm, good, *_) = optimizer.update(
            params, states, sums, NO_STATE, NO_STATE, {1: dict(zip(("loss", "weight"), totals, strict=True))}
        )
        norms.append((float(loss), float(norm), bool(good)))
    named = {
        path: np.asarray(leaf)
        for s, leaves in zip(stages, params.values(), strict=True)
        for path, leaf in zip(s.params, leaves, strict=True)
    }
    return named, norms


def expected(transformation, gradients=GRADIENTS):
    params, state = VALUES, transformation.init(VALUES)
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(found, wanted):
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=2e-5, atol=2e-6, err_msg=path)


def by_kind(params):
    return {path: "matrix" if leaf.ndim > 1 else "vector" for path, leaf in params.items()}


@pytest.mark.parametrize(
    "transformation",
    [
        OptimizerConfig(learning_rate=0.1, warmup_steps=2, decay="cosine", weight_decay=0.1).build(6),
        OptimizerConfig(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.1).build(6),
        optax.multi_transform({"matrix": optax.lamb(0.1), "vector": optax.sgd(0.1)}, by_kind),
        optax.MultiSteps(optax.adam(0.1), every_k_schedule=2),
        optax.inject_hyperparams(optax.adam)(learning_rate=optax.linear_schedule(0.1, 0.0, 6)),
        optax.adafactor(0.1),
    ],
    ids=["adamw", "sgd", "multi_transform", "MultiSteps", "inject_hyperparams", "adafactor"],
)
def test_any_separable_transformation_equals_optax(transformation):
    if isinstance(transformation, optax.MultiSteps):
        transformation = transformation.gradient_transformation()
    found, scalars = run(transformation)
    assert_close(found, expected(transformation))
    norms = [float(optax.tree.norm(g)) for g in GRADIENTS]
    assert [s[0] for s in scalars] == [2.0] * 4
    np.testing.assert_allclose([s[1] for s in scalars], norms, rtol=1e-6)


def test_clipping_counts_every_stage_once():
    wanted = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0, momentum=0.9))
    found, _ = run(optax.sgd(1.0, momentum=0.9), clip_norm=0.5)
    assert_close(found, expected(wanted))


FREEZE = {path: "freeze" if path.endswith("kernel") else "train" for path in VALUES}


def frozen(inner):
    return optax.multi_transform({"train": inner, "freeze": optax.set_to_zero()}, lambda p: {k: FREEZE[k] for k in p})


@pytest.mark.parametrize(
    "transformation",
    [
        frozen(optax.adam(0.1)),
        optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), lambda p: {k: k.endswith("kernel") for k in p})),
        optax.MultiSteps(frozen(optax.sgd(0.1)), every_k_schedule=2).gradient_transformation(),
    ],
    ids=["multi_transform", "masked", "MultiSteps"],
)
def test_the_norm_counts_no_parameter_that_is_never_moved(transformation):
    """Clipping by it is then that of the trained parameters alone."""
    wanted = [float(optax.tree.norm({k: v for k, v in g.items() if FREEZE[k] == "train"})) for g in GRADIENTS]
    _, scalars = run(transformation)
    np.testing.assert_allclose([norm for _, norm, _ in scalars], wanted, rtol=1e-6)


def test_clipping_counts_trained_parameters_alone():
    found, _ = run(frozen(optax.sgd(1.0, momentum=0.9)), clip_norm=0.5)
    clipped = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0, momentum=0.9))
    assert_close(found, expected(frozen(clipped)))


def test_clipping_leaves_small_gradients_alone():
    found, _ = run(optax.sgd(1.0), clip_norm=100.0)
    assert_close(found, expected(optax.sgd(1.0)))


def test_a_bad_gradient_changes_nothing_until_reset():
    bad = {**GRADIENTS[0], "layers/1/scale": np.float32([np.nan, 0])}
    found, scalars = run(optax.adam(0.1), gradients=[GRADIENTS[0], bad, GRADIENTS[1]])
    assert_close(found, expected(optax.adam(0.1), GRADIENTS[:1]))
    assert [good for _, _, good in scalars] == [True, False, False]


@pytest.mark.parametrize(
    ("transformation", "reason"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "pass clip_norm"),
        (optax.apply_if_finite(optax.sgd(0.1), 3), "depends on stages 0, 1"),
        (optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)), "must not draw random numbers"),
    ],
    ids=["clip_by_global_norm", "apply_if_finite", "add_noise"],
)
def test_what_needs_every_stage_is_refused(transformation, reason):
    with pytest.raises(ValueError, match=reason):
        Optimizer(transformation, [stage(0), stage(1)])
    Optimizer(transformation, [stage(0)])  # one stage has all there is


def test_optimizer_state_lies_like_the_parameters():
    optimizer = Optimizer(optax.adam(0.1), [stage(0), stage(1)])
    (state, *_) = optimizer.init({0: put(VALUES, 0), 1: put(VALUES, 1)})[0]
    assert state.mu["layers/0/kernel"].sharding.spec == PartitionSpec(None, "tensor")


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [1.0, 1.0, 1.0, 1.0]),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1.0]),
        ({"decay": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"warmup_steps": 1, "decay": "linear"}, [0.5, 1.0, 2 / 3, 1 / 3]),
    ],
)
def test_learning_rates(options, rates):
    schedule = OptimizerConfig(learning_rate=1.0, **options).schedule(4)
    np.testing.assert_allclose([float(schedule(count)) for count in range(4)], rates, rtol=1e-6)


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.0}, {"learning_rate": -1.0}, {"warmup_steps": -1}, {"weight_decay": -0.1}]
)
def test_options_that_cannot_be(options):
    with pytest.raises(ValueError, match="must be"):
        OptimizerConfig(**options)


def test_weight_decay_leaves_vectors_alone():
    zero = {k: jnp.zeros_like(v) for k, v in VALUES.items()}
    found, _ = run(OptimizerConfig(learning_rate=0.1, weight_decay=0.5).build(2), gradients=[zero])
    for path, value in VALUES.items():
        np.testing.assert_allclose(found[path], value * (0.95 if value.ndim > 1 else 1.0), rtol=1e-6)


WHOLE_MODEL = {path: leaf.ndim > 1 for path, leaf in VALUES.items()}


@pytest.mark.parametrize(
    "transformation",
    [
        optax.adamw(0.1, mask=WHOLE_MODEL),
        optax.multi_transform({True: optax.sgd(0.1), False: optax.set_to_zero()}, WHOLE_MODEL),
    ],
    ids=["mask", "labels"],
)
def test_a_tree_over_the_whole_model_is_refused_with_the_way_out(transformation):
    with pytest.raises(ValueError, match=r"one stage at a time.*layers/0/kernel.*mask=lambda params"):
        Optimizer(transformation, [stage(0), stage(1)])


def test_stages_may_be_without_parameters():
    nothing = StageParameters(RANKS[1], {}, {})
    optimizer = Optimizer(OptimizerConfig(weight_decay=0.1, clip_norm=1.0).build(4), [stage(0), nothing])
    assert len(optimizer.init({0: put(VALUES, 0), 1: ()})) == 2


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7, 64, 1024])
def test_sums_reach_the_last_stage_over_few_stages_each(num_stages):
    """The host work of a stage's update does not grow with the number of stages."""
    parents = {stage: parent(stage, num_stages) for stage in range(num_stages - 1)}
    assert all(stage < above < num_stages for stage, above in parents.items())
    assert all(children <= 2 for children in Counter(parents.values()).values())
    hops, stage = 0, 0
    while stage != num_stages - 1:
        stage, hops = parents[stage], hops + 1
    assert hops == num_stages.bit_length() - 1


@pytest.mark.parametrize(("here", "taken"), [(0, 1), (1, 1), (4, 2), (5, 3), (6, 3), (7, 2)])
def test_a_process_takes_part_in_the_transfers_of_its_own_stage_alone(here, taken, monkeypatch):
    stages = [lone_parameter(mesh) for mesh in submeshes(make_mesh(8))]
    monkeypatch.setattr("meshpipe.optimizer.updates.is_local", lambda mesh: mesh == stages[here].mesh)
    optimizer = Optimizer(optax.sgd(0.1), stages)
    assert optimizer._up.keys() == optimizer._down.keys()
    assert len(optimizer._up) == taken


def lone_parameter(mesh):
    return StageParameters(mesh, {"p": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=replicated(mesh))}, {})


def test_the_norm_is_that_of_all_of_many_stages():
    ranks = submeshes(make_mesh(8))
    optimizer = Optimizer(optax.sgd(1.0), [lone_parameter(mesh) for mesh in ranks])
    optimizer.compile()
    values = {i: (jax.device_put(np.float32([i, 2 * i]), replicated(mesh)),) for i, mesh in enumerate(ranks)}
    zeros = {i: (jax.device_put(np.zeros(2, np.float32), replicated(mesh)),) for i, mesh in enumerate(ranks)}
    nothing = dict.fromkeys(range(8), ())
    totals = jax.device_put((np.float32(1), np.float32(1)), replicated(ranks[-1]))
    params, _, _, (_, norm, good, *_) = optimizer.update(
        zeros,
        optimizer.init(zeros),
        values,
        nothing,
        nothing,
        {len(ranks) - 1: dict(zip(("loss", "weight"), totals, strict=True))},
    )
    assert float(norm) == np.sqrt(np.float32(5 * sum(i**2 for i in range(8))))
    assert bool(good)
    for i in range(8):
        np.testing.assert_array_equal(params[i][0], [-i, -2 * i])
