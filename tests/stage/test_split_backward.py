"""A backward in two parts: what each computes, and what is kept between them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from staged import staged

from meshpipe import PipelineConfig
from meshpipe.layers.task import Task
from meshpipe.mesh import make_mesh
from meshpipe.stage.jaxpr import function_of
from meshpipe.stage.programs import compile_stage
from meshpipe.stage.split_backward import SplitBackward

NAMES = ("scale", "kernel", "bias")
SIZES = {"scale": (8,), "kernel": (8, 16), "bias": (16,)}


def normed_product(params, x):
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True)) * params["scale"]
    return jnp.tanh(normed @ params["kernel"] + params["bias"])


def arguments():
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=SIZES[name]).astype(np.float32) for name in NAMES}
    return params, *(rng.normal(size=(32, size)).astype(np.float32) for size in (8, 16))


def test_sums_of_many_terms_are_made_with_the_gradient_of_the_input() -> None:
    params, x, gradient = arguments()

    def backward(*flat):
        *leaves, x, gradient = flat
        into, into_x = jax.vjp(normed_product, dict(zip(NAMES, leaves, strict=True)), x)[1](gradient)
        return *(into[name] for name in NAMES), into_x

    flat = *(params[name] for name in NAMES), x, gradient
    cut = SplitBackward(jax.make_jaxpr(backward)(*flat), 3, 3)
    # The terms of the gradient of the scale would be [32, 8]. Those of the bias are kept anyway, for the kernel.
    assert cut.early == (0,)
    assert cut.late == (1, 2)
    assert sorted(v.aval.shape for v in cut.crossing) in ([(32, 8), (32, 16)], [(32, 16)])
    into_x, *rest = function_of(cut.input_part())(*flat)
    crossing, early = rest[: len(cut.crossing)], rest[len(cut.crossing) :]
    late = function_of(cut.weight_part())(*flat[:3], *(flat[3:][i] for i in cut.carried), *crossing)
    for found, wanted in zip((*early, *late, into_x), backward(*flat), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


class Look(nnx.Module):
    """An embedding: nothing that it is handed has a gradient."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(16, 8, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return self.embed(inputs)


def test_a_stage_without_gradients_of_its_input_calls_no_program_for_them() -> None:
    batch = {"inputs": np.zeros((4, 3), np.int32), "targets": np.zeros((4, 3, 8), np.float32)}
    task = Task(
        [Look, lambda rngs: nnx.Linear(8, 8, rngs=rngs)],
        lambda output, batch: (((output - batch["targets"]) ** 2).sum(), jnp.float32(output.shape[0])),
        batch=batch,
    )
    config = PipelineConfig(num_microbatches=2, schedule="zb-h1", remat="full")
    model = staged(task, make_mesh(2, 1), config)
    first, last = model.trace()
    ops = {action.op for action in model.plan.actions}
    programs = compile_stage(first, ops, remat="full")
    assert programs.split is not None
    assert programs.split.input is None
    assert programs.split.weight is not None
    assert programs.recompute is None  # there is nothing to compute again
    assert compile_stage(last, ops, remat="full").split.input is not None
