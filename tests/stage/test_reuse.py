"""What was computed once per step is read, and not computed again, where layers are recomputed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr
from staged import staged

from meshpipe import PipelineConfig, make_mesh, verify
from meshpipe.layers.task import Task
from meshpipe.sharding import FULLY_SHARDED, ShardingRules
from meshpipe.stage.backward import trace_backward
from meshpipe.stage.jaxpr import function_of, variables
from meshpipe.stage.prepared import is_gather
from meshpipe.stage.reuse import reuse
from meshpipe.stage.target import ACCELERATOR, CPU, Target
from meshpipe.stage.traced import TracedStage


def test_equal_operations_on_equal_inputs_are_found_and_others_are_not() -> None:
    def before(w: jax.Array, b: jax.Array) -> Any:
        return (jnp.sin(w) * 2).astype(jnp.bfloat16), b.astype(jnp.bfloat16)

    def program(w: jax.Array, b: jax.Array, cast: jax.Array, bias: jax.Array, x: jax.Array) -> Any:
        again = (jnp.sin(w) * 2).astype(jnp.bfloat16)
        other = (jnp.sin(w) * 3).astype(jnp.bfloat16)
        return x.astype(jnp.bfloat16) @ again + other + b.astype(jnp.bfloat16), again

    w, b, x = (jnp.linspace(0.1, 1, 9).reshape(3, 3) * factor for factor in (1, 2, 3))
    first, second = before(w, b)
    closed = jax.make_jaxpr(program)(w, b, first, second, x)
    inputs = closed.jaxpr.invars
    less = reuse(closed, jax.make_jaxpr(before)(w, b), inputs[:2], inputs[2:4])
    casts = [e for e in less.jaxpr.eqns if e.primitive.name == "convert_element_type"]
    assert len(casts) == 2  # of `other` and x
    assert less.jaxpr.outvars[1] is inputs[2]
    expected = program(w, b, first, second, x)
    for found, value in zip(function_of(less)(w, b, first, second, x), expected, strict=True):
        np.testing.assert_array_equal(found, value)
    # What was handed over is what is read.
    zero = jnp.zeros_like(first)
    np.testing.assert_array_equal(function_of(less)(w, b, zero, second, x)[1], zero)


def test_operations_on_what_was_computed_before_are_found_as_well() -> None:
    def before(w: jax.Array) -> Any:
        return jnp.sin(w), jnp.sin(w).astype(jnp.bfloat16)

    def program(w: jax.Array, sine: jax.Array, cast: jax.Array) -> Any:
        return sine.astype(jnp.bfloat16) * 2

    w = jnp.ones((3, 3))
    closed = jax.make_jaxpr(program)(w, *before(w))
    less = reuse(closed, jax.make_jaxpr(before)(w), closed.jaxpr.invars[:1], closed.jaxpr.invars[1:])
    assert [e.primitive.name for e in less.jaxpr.eqns] == ["mul"]


def traced_backward(stage: TracedStage) -> ClosedJaxpr:
    shapes = [
        tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in values)
        for values in (stage.hoisted_vars, stage.residual_vars)
    ]
    with jax.set_mesh(stage.spec.mesh):
        return trace_backward(stage, *shapes)


class Half(nnx.Module):
    """Parameters in float32, used in bfloat16."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", None))
        self.linear = nnx.Linear(8, 8, dtype=jnp.bfloat16, kernel_init=init, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(self.linear(x)).astype(x.dtype)


@pytest.mark.parametrize("target", [CPU, ACCELERATOR], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("rules", [ShardingRules(), FULLY_SHARDED], ids=["replicated", "fully sharded"])
@pytest.mark.parametrize("remat", ["none", "layer", "nothing_saveable"])
def test_backward_casts_no_parameter_and_none_is_kept_beside_its_cast(
    remat: str, rules: ShardingRules, target: Target
) -> None:
    task = Task(
        [Half] * 4,
        lambda output, batch: ((output**2).sum(), output.size),
        batch={"inputs": np.ones((4, 8), "f4")},
        rules=rules,
    )
    config = PipelineConfig(num_microbatches=2, remat=remat)
    for stage in staged(task, make_mesh(2, 2), config, target=target).trace():
        backward = traced_backward(stage)
        assert [v.aval.dtype for v in stage.prepared_vars] == [jnp.bfloat16] * 4
        params = set(backward.jaxpr.invars[: len(stage.params)])
        assert params.isdisjoint(v for e in backward.jaxpr.eqns for v in variables(e.invars))


class Normalised(nnx.Module):
    """Weights that are computed from a parameter, which their derivative reads as well."""

    def __init__(self, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", None))
        self.weight = nnx.Param(init(rngs.params(), (8, 8)))

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.weight[...]
        return x + jnp.tanh(x @ (weight / jnp.linalg.norm(weight, axis=0)))


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_parameters_that_backward_reads_are_gathered_once_per_step(remat: str) -> None:
    task = Task(
        [Normalised] * 2,
        lambda output, batch: ((output**2).sum(), output.size),
        batch={"inputs": np.ones((4, 8), "f4")},
        rules=FULLY_SHARDED,
    )
    for stage in staged(task, make_mesh(2, 2), PipelineConfig(num_microbatches=2, remat=remat)).trace():
        backward = traced_backward(stage)
        for program in (stage.forward(outputs=True, residuals=True), backward):
            assert not any(is_gather(e) for e in program.jaxpr.eqns)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_fully_sharded_layers_that_are_recomputed_learn_what_plain_ones_do(schedule: str) -> None:
    rows = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    report = verify(
        [Half] * 4,
        lambda output, batch: ((output**2).sum(), output.size),
        optax.adam(1e-2),
        batches=[{"inputs": each} for each in rows],
        mesh=make_mesh(2, 2),
        pipeline=PipelineConfig(num_microbatches=2, remat="layer", schedule=schedule),
        rules=FULLY_SHARDED,
    )
    assert report.ok, report.first
