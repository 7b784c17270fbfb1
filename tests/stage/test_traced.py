"""One stage, traced: what it reads, what it keeps for backward, and that its parts make up the whole."""

from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr, Var
from staged import staged

from meshpipe import PipelineConfig, make_mesh
from meshpipe.layers.task import Task
from meshpipe.mesh import submeshes
from meshpipe.plan.plan import Op
from meshpipe.sharding import abstract, replicated
from meshpipe.stage.jaxpr import DERIVATIVE_PRIMITIVES, function_of
from meshpipe.stage.programs import compile_stage
from meshpipe.stage.spec import Boundary, Given, StageFunction, StageOutput, StageSpec
from meshpipe.stage.target import CPU
from meshpipe.stage.traced import TracedStage

ROWS, WIDTH, HIDDEN, MICROBATCHES = 3, 4, 10, 2
(MESH,) = submeshes(make_mesh(1))
CALLS: Counter[type] = Counter()


class Block(nnx.Module):
    """Parameters in float32, computation in bfloat16."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, HIDDEN, dtype=jnp.bfloat16, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        CALLS[type(self)] += 1
        return x + self.down(jnp.tanh(self.up(x))).astype(x.dtype)


class Drop(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        jax.debug.print("largest {}", x.max())
        return self.drop(x) * scale[:, None]


def loss(output: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return ((output - batch["target"]) ** 2).sum(), jnp.float32(output.size)


@pytest.fixture(scope="module")
def stages() -> list[TracedStage]:
    rows = MICROBATCHES * ROWS
    batch = {
        "inputs": np.ones((rows, WIDTH), np.float32),
        "scale": np.ones(rows, np.float32),
        "target": np.ones((rows, WIDTH), np.float32),
        "unused": np.ones((rows, 7), np.float32),
    }
    model = staged(
        Task([Block, Block, Drop, Block], loss, batch=batch),
        make_mesh(4),
        PipelineConfig(num_microbatches=MICROBATCHES),
    )
    CALLS.clear()
    return model.trace()


def described(values: list[Var]) -> list[str]:
    return sorted(v.aval.str_short(short_dtypes=True) for v in values)  # type: ignore[attr-defined]


def count(closed: ClosedJaxpr, primitive: str) -> int:
    return sum(equation.primitive.name == primitive for equation in closed.jaxpr.eqns)


def backward(stage: TracedStage) -> ClosedJaxpr:
    hoisted, kept_x, kept_state, fresh = (
        tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in values)
        for values in (
            stage.hoisted_vars,
            [stage.x_vars[i] for i in stage.kept_x],
            [stage.state_vars[i] for i in stage.kept_state],
            stage.residual_vars,
        )
    )
    seeds = tuple(shape for shapes in stage.output_gradients for shape in shapes)
    arguments = (stage.params, hoisted, stage.inputs, stage.microbatch, (kept_x, kept_state), fresh, seeds)
    return jax.make_jaxpr(stage.pull_back)(*arguments)


def test_layers_are_traced_once_with_their_derivative(stages: list[TracedStage]) -> None:
    for stage in stages:
        stage.forward(outputs=True, residuals=True)
        backward(stage)
    assert CALLS[Block] == 3


def test_a_stage_reads_what_its_layers_read(stages: list[TracedStage]) -> None:
    names = [stage.input_names for stage in stages]
    assert names == [("inputs",), (), (Given.SEED, Given.PATHS, Given.STEP, "scale"), ("target",)]
    for stage in stages:
        assert len(stage.inputs) == len(stage.input_names)
    assert stages[2].inputs[-1].shape == (MICROBATCHES, ROWS)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_residuals_hold_activations_and_no_weights(stages: list[TracedStage], index: int) -> None:
    """The first stage keeps them too, although all of its forward follows from parameters and the batch."""
    stage = stages[index]
    weights = {tuple(shape.shape) for shape in stage.params}
    assert not any(v.aval.shape in weights for v in stage.residual_vars)
    hidden, cast = f"bf16[{ROWS},{HIDDEN}]", f"bf16[{ROWS},{WIDTH}]"  # the cast of the batch is as good as there
    assert set(described(stage.residual_vars)) == ({hidden} if index == 0 else {hidden, cast})


def test_bfloat16_weights_are_made_once_per_step(stages: list[TracedStage]) -> None:
    casts = [f"bf16[{HIDDEN},{WIDTH}]", f"bf16[{HIDDEN}]", f"bf16[{WIDTH},{HIDDEN}]", f"bf16[{WIDTH}]"]
    assert described(stages[1].hoisted_vars) == sorted(casts)
    forward = stages[1].forward(outputs=True, residuals=True)
    assert not any(v.aval.shape == (WIDTH, HIDDEN) for e in forward.jaxpr.eqns for v in e.outvars)


@pytest.mark.parametrize(("index", "products"), [(0, 3), (1, 4)])
def test_backward_computes_gradients_and_nothing_again(stages: list[TracedStage], index: int, products: int) -> None:
    """Two layers need two products each, the very first one only that of its weights."""
    assert count(backward(stages[index]), "dot_general") == products
    assert count(stages[index].forward(outputs=True, residuals=True), "dot_general") == 2


def test_a_print_belongs_to_forward_and_not_to_recomputation(stages: list[TracedStage]) -> None:
    assert stages[2].forward(outputs=True, residuals=True).jaxpr.effects
    assert not stages[2].forward(outputs=False, residuals=True).jaxpr.effects
    assert not backward(stages[2]).jaxpr.effects


def test_a_dropout_mask_is_drawn_in_forward_and_kept(stages: list[TracedStage]) -> None:
    assert f"bool[{ROWS},{WIDTH}]" in described(stages[2].residual_vars)
    assert stages[2].spec.params == {}


def test_boundaries_are_what_the_layers_return(stages: list[TracedStage]) -> None:
    shapes = [[[leaf.shape for leaf in boundary.leaves] for boundary in stage.boundaries_out] for stage in stages]
    assert shapes == [[[(ROWS, WIDTH)]]] * 3 + [[]]


def spec(function: StageFunction, params: dict[str, tuple[int, ...]]) -> StageSpec:
    shapes = {path: abstract(shape, jnp.float32, replicated(MESH)) for path, shape in params.items()}
    state = {"count": abstract((), jnp.int32, replicated(MESH))}
    return StageSpec(0, MESH, CPU, function, shapes, state, gradients_in=(True,), readers=(1,))


def middle(params: Any, state: Any, values: Any, batch: Any, randomness: Any) -> StageOutput:
    """A stage written without NNX: several arrays in and out, integers among them, and a counter."""
    (activation,) = values
    h = jnp.sin(activation["h"]) @ params["w"] + batch["shift"][:, None]
    h = h * (1 + state["count"])
    return StageOutput(({"h": (h, activation["i"] + 1), "scale": 2.0},), {}, None, {"count": state["count"] + 1})


def test_the_parts_of_a_stage_make_up_its_function_and_derivative() -> None:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32)
    x = {"h": jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32), "i": jnp.arange(ROWS)}
    shift = jnp.asarray(rng.normal(size=(MICROBATCHES, ROWS)), jnp.float32)
    fields = {"shift": jax.ShapeDtypeStruct(shift.shape, shift.dtype)}
    boundary = Boundary(jax.eval_shape(lambda: x))
    stage = TracedStage(spec(middle, {"w": w.shape}), [boundary], fields)

    assert stage.input_names == ("shift",)
    hoisted = function_of(stage.prepare())(w)
    microbatch, count = jnp.uint32(1), jnp.int32(4)
    arguments = (w, *hoisted, count, *jax.tree.leaves(x), shift, microbatch)
    out, index, scale, new_count, *fresh = function_of(stage.forward(outputs=True, residuals=True))(*arguments)
    assert (int(new_count), float(scale), index.tolist()) == (5, 2.0, [1, 2, 3])

    def whole(w: jax.Array, h: jax.Array) -> jax.Array:
        return middle({"w": w}, {"count": 4}, ({**x, "h": h},), {"shift": shift[1]}, None).values[0]["h"][0]

    np.testing.assert_allclose(out, whole(w, x["h"]), rtol=1e-6)
    (after,) = stage.boundaries_out
    assert after.differentiable == (0, 2)
    seeds = (jnp.asarray(rng.normal(size=out.shape), jnp.float32), jnp.zeros(()))
    kept = tuple(jax.tree.leaves(x)[i] for i in stage.kept_x), tuple((count,)[i] for i in stage.kept_state)
    (into_w,), (into_h,) = stage.pull_back((w,), tuple(hoisted), (shift,), microbatch, kept, tuple(fresh), seeds)
    expected_w, expected_h = jax.vjp(whole, w, x["h"])[1](seeds[0])
    np.testing.assert_allclose(into_w, expected_w, rtol=1e-6)
    np.testing.assert_allclose(into_h, expected_h, rtol=1e-6)


def test_inputs_that_backward_needs_are_kept_as_they_came() -> None:
    """An activation that is both an input and a residual is one array."""
    fields = {"shift": jax.ShapeDtypeStruct((MICROBATCHES, ROWS), jnp.float32)}
    boundary = Boundary({"h": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)})

    def product(params: Any, state: Any, values: Any, batch: Any, randomness: Any) -> StageOutput:
        return StageOutput((values[0]["h"] @ params["w"],), {}, None, state)

    stage = TracedStage(spec(product, {"w": (WIDTH, WIDTH)}), [boundary], fields)
    assert (stage.kept_x, stage.residual_vars, stage.kept_state) == ((0,), [], ())


def test_gradients_of_several_readers_are_added_from_the_last_to_the_first() -> None:
    """Whatever the order in which they arrive; in floating-point numbers, another order has another sum."""
    fields = {"inputs": jax.ShapeDtypeStruct((MICROBATCHES, ROWS, WIDTH), jnp.float32)}

    def two(params: Any, state: Any, values: Any, batch: Any, randomness: Any) -> StageOutput:
        scaled = batch["inputs"] * params["w"]
        return StageOutput((scaled, {"a": 2 * scaled, "count": jnp.arange(ROWS)}), {}, None, state)

    stage = TracedStage(replace(spec(two, {"w": (ROWS, WIDTH)}), gradients_in=(), readers=(3, 1)), [], fields)
    assert [len(shapes) for shapes in stage.output_gradients] == [1, 1, 1, 1]
    first, second, third = (jnp.full((ROWS, WIDTH), number, jnp.float32) for number in (1.0, 1e8, -1e8))
    zeros = jnp.zeros((ROWS, WIDTH))
    ones = jnp.ones((MICROBATCHES, ROWS, WIDTH))
    arguments = (jnp.ones((ROWS, WIDTH)),), (), (ones,), jnp.uint32(0), ((), ()), ()
    (into_w,), _ = stage.pull_back(*arguments, (first, second, third, zeros))
    np.testing.assert_array_equal(into_w, (third + second) + first)
    assert not np.array_equal(into_w, third + (second + first))


def test_a_stage_without_a_backward_has_no_derivative_and_stores_nothing() -> None:
    fields = {"inputs": jax.ShapeDtypeStruct((MICROBATCHES, ROWS, WIDTH), jnp.float32)}
    boundary = Boundary(jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32))

    def gelu(params: Any, state: Any, values: Any, batch: Any, randomness: Any) -> StageOutput:
        total = jax.nn.relu(values[0]).sum()
        return StageOutput((jax.nn.gelu(values[0] @ state["w"]),), {"terms/size": total}, total, state)

    frozen = {"w": abstract((WIDTH, WIDTH), jnp.float32, replicated(MESH))}
    of_stage = replace(spec(gelu, {}), state=frozen, has_backward=False, gradients_in=(False,))
    stage = TracedStage(of_stage, [boundary], fields)
    assert (stage.pullback_vars, stage.residual_vars, stage.kept_x, stage.kept_state) == ([], [], (), ())
    assert stage.x_gradients == stage.output_gradients == ()
    assert stage.sum_names == ("terms/size",)
    assert len(stage.closed.jaxpr.outvars) == 3  # value, sum and state
    # A function with a derivative of its own is a call like others where nobody takes it.
    assert DERIVATIVE_PRIMITIVES.isdisjoint(e.primitive.name for e in stage.closed.jaxpr.eqns)
    programs = compile_stage(stage, set(Op))
    assert programs.backward is programs.split is programs.recompute is None
