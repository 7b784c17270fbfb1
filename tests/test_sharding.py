"""From logical axes to mesh axes, and where batches and boundary values lie."""

from dataclasses import replace

import pytest
import tiny_recipes
from jax.sharding import PartitionSpec as P

from meshpipe.mesh import MeshConfig, make_mesh, submeshes
from meshpipe.reference.verify import verify_recipe
from meshpipe.runs.build import make_chooser, make_trainer
from meshpipe.sharding import (
    FULLY_SHARDED,
    ShardingRules,
    activation_sharding,
    batch_sharding,
    is_over_data,
    replicated,
    without_data,
)

MESH = submeshes(make_mesh(1, 2, 4))[0]


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("embed", "hidden"), P(None, "tensor")),
        (("heads", None, "embed"), P("tensor", None, None)),
        (("vocab", "embed"), P("tensor", None)),
        ((None, None), P(None, None)),
        ((), P()),
        (None, P()),
        (("data", "tensor"), P("data", "tensor")),
    ],
)
def test_default_rules_split_heads_hidden_and_vocabulary(axes: tuple[str | None, ...] | None, spec: P) -> None:
    assert ShardingRules().spec(axes, MESH) == spec


def test_fully_sharded_rules_split_the_embedding_axis_over_data() -> None:
    assert FULLY_SHARDED.spec(("embed", "hidden"), MESH) == P("data", "tensor")


def test_a_strategy_changes_the_rules_and_not_the_names() -> None:
    rules = ShardingRules({"hidden": None, "embed": "tensor"})
    assert rules.spec(("embed", "hidden"), MESH) == P("tensor", None)


def test_an_unknown_logical_axis_names_the_rules_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"Got 'width', with rules for heads, .*ShardingRules\(rules="):
        ShardingRules().spec(("width",), MESH)


def test_a_split_axis_must_divide_by_its_mesh_axis() -> None:
    message = r"layers/0/kernel has 6 hidden in dim 1, and the mesh axis tensor has 4 parts. Choose a divisor of 6"
    with pytest.raises(ValueError, match=message):
        ShardingRules().sharding("layers/0/kernel", (3, 6), ("embed", "hidden"), MESH)


def test_a_leaf_is_placed_by_its_names() -> None:
    sharding = ShardingRules().sharding("layers/0/kernel", (3, 8), ("embed", "hidden"), MESH)
    assert (sharding.mesh, sharding.spec) == (MESH, P(None, "tensor"))
    assert sharding.shard_shape((3, 8)) == (3, 2)
    assert ShardingRules().sharding("layers/0/scale", (3,), None, MESH) == replicated(MESH)


@pytest.mark.parametrize(
    ("shape", "axes", "spec"),
    [
        ((8, 4), ("embed", "hidden"), P("data", "tensor")),
        ((8, 4), ("hidden", "embed"), P(("tensor", "data"), None)),
        ((12, 4), ("hidden", "embed"), P("tensor", "data")),  # 12 rows cannot be split in 8
        ((2, 4), (None, "embed"), P("data", None)),
        ((3, 4), (None, "embed"), P(None, "data")),
        ((4,), ("embed",), P("data")),
    ],
)
def test_data_splits_the_first_dim_between_steps_where_it_divides(
    shape: tuple[int, ...], axes: tuple[str | None, ...], spec: P
) -> None:
    found = FULLY_SHARDED.sharding("layers/0/kernel", shape, axes, MESH).spec
    assert found == spec
    in_step = ("tensor" if "tensor" in str(rule) else None for rule in spec)
    assert without_data(found) == P(*in_step)
    assert is_over_data(found)
    assert not is_over_data(without_data(found))


def test_a_dim_that_data_splits_in_a_step_too_stays_the_one_that_is_named() -> None:
    rules = ShardingRules({"experts": "data", "hidden": "tensor"})
    assert rules.sharding("layers/0/kernel", (8, 2), ("hidden", "experts"), MESH).spec == P("tensor", "data")


def test_a_model_that_names_no_axes_cannot_be_fully_sharded() -> None:
    config = replace(tiny_recipes.pipeline(), mesh=MeshConfig(data=2), sharding="fully-sharded")
    for make in (lambda config: make_chooser(config).choose(), make_trainer, verify_recipe):
        with pytest.raises(ValueError, match=r"Got a model that names none of embed\. .* keep parameters replicated"):
            make(config)


def test_batches_are_split_within_each_microbatch() -> None:
    """Leading dims of a field are the microbatches and their rows; a microbatch must not sit on one device."""
    assert batch_sharding(MESH, 8).spec == P(None, "data")
    assert batch_sharding(MESH, 8).shard_shape((3, 8, 5)) == (3, 4, 5)


@pytest.mark.parametrize(
    ("shape", "spec"), [((8, 3), P("data")), ((8,), P("data")), ((3, 8), P()), ((), P()), ((1, 8, 3), P())]
)
def test_boundary_values_are_split_where_their_leading_dim_is_the_microbatch(shape: tuple[int, ...], spec: P) -> None:
    assert activation_sharding(MESH, shape, microbatch_size=8).spec == spec
