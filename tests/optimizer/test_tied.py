"""Tied leaves: one gradient, one update, one value, and a norm that counts them once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from meshpipe.mesh import make_mesh, submeshes
from meshpipe.optimizer.optimizer import Optimizer
from meshpipe.optimizer.parameters import StageParameters
from meshpipe.optimizer.tied import TiedLeaves, borrowed
from meshpipe.sharding import abstract, replicated

RANKS = submeshes(make_mesh(2, 1, 2))
OWNER, NEAR, FAR, OTHER = "layers/0/table", "layers/1/table", "layers/2/table", "layers/3/bias"
GROUPS = [(OWNER, NEAR, FAR)]


def stage(number: int, leaves: dict[str, tuple[int, ...]], dtype: Any = jnp.float32) -> StageParameters:
    """Tables are split over `tensor`, in the second stage along the other dim."""
    mesh = RANKS[number]
    specs = {1: PartitionSpec(), 2: PartitionSpec(*(("tensor", None) if number == 0 else (None, "tensor")))}
    params = {path: abstract(shape, dtype, NamedSharding(mesh, specs[len(shape)])) for path, shape in leaves.items()}
    return StageParameters(mesh, params, {}, borrowed(GROUPS).intersection(params))


STAGES = [stage(0, {OWNER: (4, 6), NEAR: (4, 6)}), stage(1, {FAR: (4, 6), OTHER: (6,)})]


NO_STATE: dict[int, tuple[jax.Array, ...]] = {0: (), 1: ()}


def put(values: dict[str, Any], stages: list[StageParameters] = STAGES) -> dict[int, tuple[jax.Array, ...]]:
    return {
        number: tuple(jax.device_put(values[p], leaf.sharding) for p, leaf in s.params.items())
        for number, s in enumerate(stages)
    }


def values(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=leaf.shape).astype(np.float32) for s in STAGES for path, leaf in s.params.items()}


def test_gradients_of_a_group_add_up_at_the_owner() -> None:
    given = values(0)
    (owner, near), (far, other) = TiedLeaves(GROUPS, STAGES).sum_gradients(put(given)).values()
    np.testing.assert_array_equal(owner, (given[OWNER] + given[NEAR]) + given[FAR])
    assert owner.sharding == STAGES[0].params[OWNER].sharding
    for leaf, path in ((near, NEAR), (far, FAR), (other, OTHER)):
        np.testing.assert_array_equal(leaf, given[path])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_shared_to_the_bit_where_each_leaf_lives(dtype: Any) -> None:
    stages = [stage(0, {OWNER: (4, 6), NEAR: (4, 6)}, dtype), stage(1, {FAR: (4, 6), OTHER: (6,)}, dtype)]
    given = {path: jnp.asarray(value, dtype) for path, value in values(0).items()}
    (owner, near), (far, other) = TiedLeaves(GROUPS, stages).share_values(put(given, stages)).values()
    for leaf in (owner, near, far):
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), np.asarray(given[OWNER], np.float32))
    np.testing.assert_array_equal(np.asarray(other, np.float32), np.asarray(given[OTHER], np.float32))
    assert near.sharding == stages[0].params[NEAR].sharding
    assert far.sharding == stages[1].params[FAR].sharding


def test_a_shared_value_outlives_the_owner() -> None:
    """The owner is donated at the next update, also where both lie on the same devices."""
    (owner, near), (far, _) = TiedLeaves(GROUPS, STAGES).share_values(put(values(0))).values()
    owner.delete()
    np.testing.assert_array_equal(near, values(0)[OWNER])
    np.testing.assert_array_equal(far, values(0)[OWNER])


def test_updates_are_those_of_one_parameter() -> None:
    """Three updates with Adam equal Optax on a model that has the table once."""
    transformation, weight = optax.adam(0.1), np.float32(4.0)
    optimizer, tied = Optimizer(transformation, STAGES, clip_norm=0.5), TiedLeaves(GROUPS, STAGES)
    optimizer.compile()
    params = tied.share_values(put(values(0)))
    states = optimizer.init(params)
    assert [len(jax.tree.leaves(state)) for state in states.values()] == [
        3,
        3,
    ]  # a count, and two moments of one owned leaf

    plain = {OWNER: values(0)[OWNER], OTHER: values(0)[OTHER]}
    chain = optax.chain(optax.clip_by_global_norm(0.5), transformation)
    plain_state = chain.init(plain)
    for step in range(1, 4):
        given = values(step)
        gradients = tied.sum_gradients(put({path: value * weight for path, value in given.items()}))
        totals = jax.device_put((np.float32(1), weight), replicated(RANKS[1]))
        params, states, _, (_, norm, *_) = optimizer.update(
            params, states, gradients, NO_STATE, NO_STATE, {1: dict(zip(("loss", "weight"), totals, strict=True))}
        )
        params = tied.share_values(params)

        mean = {OWNER: given[OWNER] + given[NEAR] + given[FAR], OTHER: given[OTHER]}
        assert float(norm) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-6)
        updates, plain_state = chain.update(mean, plain_state, plain)
        plain = optax.apply_updates(plain, updates)
        (owner, near), (far, other) = params.values()
        np.testing.assert_array_equal(owner, near)
        np.testing.assert_array_equal(owner, far)
    np.testing.assert_allclose(owner, plain[OWNER], rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(other, plain[OTHER], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(OWNER, "layers/9/table")], r"must be a parameter. Got 'layers/9/table'; parameters are layers/0/table"),
        ([(OWNER, FAR), (NEAR, FAR)], r"tied once. Got 'layers/2/table' 2 times; put it in one group"),
        ([(OWNER, OWNER)], r"tied once. Got 'layers/0/table' 2 times"),
        ([(OWNER, OTHER)], r"same shape and dtype. Got layers/0/table \(4, 6\) and layers/3/bias \(6,\)"),
    ],
)
def test_groups_that_cannot_be(groups: list[tuple[str, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TiedLeaves(groups, STAGES)


def test_the_first_of_a_group_owns_it() -> None:
    assert borrowed([("a", "b", "c"), ("d", "e")]) == {"b", "c", "e"}
    assert borrowed([]) == frozenset()
