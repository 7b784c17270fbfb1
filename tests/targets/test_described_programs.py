"""Every program compiles for accelerators that are not here: what it communicates, and that donated buffers are reused.

The wheels of CUDA are gigabytes: tests/targets/gpu.sh installs them and runs the half that is for GPUs.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from described import LAYOUTS, NEEDS, Layout, bytes_on_a_device, compiled, language_model, model_of, platforms
from flax import nnx
from jax.experimental import pallas as pl

from meshpipe.layers.task import Task
from meshpipe.models.language_model import WindowConfig
from meshpipe.sharding import FULLY_SHARDED

pytestmark = pytest.mark.slow

FORWARDS = ("forward", "recompute")
BACKWARDS = ("backward", "backward_input", "backward_weight", "forward_backward")
ONCE_PER_STEP = ("prepare", "zeros", "reduce", "norm", "update")

ALLOWED: Mapping[str, Mapping[str, frozenset[str]]] = {
    # Activations after attention and after the perceptron, in forward and in backward. Nothing gathers the logits.
    # The norm of the gradients, and whether all devices have finite parameters, are scalars.
    "tensor": dict.fromkeys((*FORWARDS, *BACKWARDS, "norm", "update"), frozenset({"all-reduce"})),
    "data": {"reduce": frozenset({"all-reduce"})},
    "data, zb-h1": {"reduce": frozenset({"all-reduce"})},
    # Parameters are gathered once per step. A TPU's reduce-scatter stands in the text as an all-reduce inside a fusion,
    # and its gather of small parameters as an all-reduce.
    "fully sharded": {
        "prepare": frozenset({"all-gather", "all-reduce"}),
        "reduce": frozenset({"all-reduce", "reduce-scatter"}),
        "norm": frozenset({"all-reduce"}),
        "update": frozenset({"all-reduce"}),
    },
    "all, zb-v": dict.fromkeys((*FORWARDS, *BACKWARDS, "norm", "update"), frozenset({"all-reduce"}))
    | {
        "prepare": frozenset({"all-gather", "all-reduce"}),
        "reduce": frozenset({"all-reduce", "reduce-scatter"}),
    },
}
"""The kinds of collectives of each program, by layout; all other programs have none."""

TENSOR_COUNTS = {
    (0, "forward"): 3,  # the embedding, split by its vocabulary; attention; the perceptron
    (0, "backward"): 2,
    (1, "forward_backward"): 7,  # two and two of the block; the loss: largest logit, sum and target; the head's input
}

CUSTOM_CALLS = {
    "tpu": {"tpu_custom_call", "AssumeGatherIndicesInBound", "GatherScatterIndicesBitpacked"},
    "gpu": {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"},
}
"""What programs call that XLA has not written itself. `tpu_custom_call` is a Pallas kernel; the others of a TPU are
marks of its compiler."""


@platforms
@pytest.mark.parametrize("name", LAYOUTS)
def test_programs_communicate_when_they_must_and_reuse_what_is_donated(name: str, platform: str) -> None:
    layout = LAYOUTS[name]
    model = language_model(platform, layout)
    programs = compiled(model, platform)
    assert {stage for stage, _ in programs} == set(model.traced)
    for (stage, program), said in programs.items():
        where = f"{program} of stage {stage} for {platform}, {name}: {said}"
        assert set(said.collectives) <= ALLOWED.get(name, {}).get(program, frozenset()), where
        assert {call for call in said.custom_calls if "gemm" not in call} <= CUSTOM_CALLS[platform], where
        params = bytes_on_a_device(model.traced[stage].params)
        assert bool(said.read) == bool(said.collectives), f"all is read: {where}"
        assert all(collective.axes for collective in said.read), f"over known axes: {where}"
        if program in (*FORWARDS, *BACKWARDS):
            axes = {axis for collective in said.read for axis in collective.axes}
            assert axes <= {"tensor"}, f"the data axis communicates once per step: {where}"
        # With fully sharded parameters, each device accumulates whole gradients: those of its own examples.
        gradients = params if layout.rules is not FULLY_SHARDED else 0
        if program in BACKWARDS or (program == "reduce" and gradients):
            assert said.aliased >= gradients, f"gradients are accumulated in place: {where}"
        if program in ("prepare", "reduce"):
            assert not said.transposes, f"a device has rows that lie together: {where}"
        if program == "update":
            assert said.aliased >= 3 * params, f"parameters and both moments of AdamW are updated in place: {where}"
    if name == "tensor":
        found = {key: programs[key].collectives["all-reduce"] for key in TENSOR_COUNTS}
        assert found == TENSOR_COUNTS
    if "zb-v" in name:
        assert (0, "backward_input") not in programs, "nothing that the embedding is handed has a gradient"
        assert (0, "recompute") not in programs, "an embedding has nothing to compute again"
    if layout.data > 1:
        assert all(sum(programs[stage, "reduce"].collectives.values()) > 0 for stage in model.traced)


@platforms
def test_the_fused_kernel_is_taken(platform: str) -> None:
    model = language_model(platform, LAYOUTS["1f1b"])
    kernel = {"tpu": "Pallas", "gpu": "cuDNN"}[platform]
    assert model.choices[0].startswith(f"Attention by {kernel}")
    calls = compiled(model, platform)[0, "forward"].custom_calls
    assert calls & ({"tpu_custom_call"} if platform == "tpu" else {"__cudnn$fmhaScaleBiasSoftmax"})


@NEEDS["gpu"]
@pytest.mark.parametrize("head_dim", [192, 256])
def test_cudnn_takes_large_heads_on_described_gpus(head_dim: int) -> None:
    """As on these GPUs themselves, forward and backward; JAX alone refuses where it finds no GPU to ask."""
    platform = "gpu"
    layout = Layout(config={"remat": "full"})
    model = language_model(platform, layout, head_dim=head_dim, window=WindowConfig(size=32, global_every=2))
    assert model.choices[0] == "Attention by cuDNN."
    programs = compiled(model, platform)
    forward, backward = (f"__cudnn$fmhaScaleBiasSoftmax{end}" for end in ("", "Backward"))
    assert forward in programs[0, "forward"].custom_calls
    assert {forward, backward} <= programs[0, "backward"].custom_calls | programs[1, "forward_backward"].custom_calls


def scale_kernel(x_ref: Any, factor_ref: Any, out_ref: Any) -> None:
    out_ref[...] = x_ref[...] * factor_ref[...]


@jax.custom_vjp
def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    # Broadcast outside of the kernel: on GPUs, its operands must have one layout.
    factors = jnp.broadcast_to(factor, x.shape)
    return pl.pallas_call(scale_kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x, factors)


def scaled_forward(x: jax.Array, factor: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return scaled(x, factor), (x, factor)


def scaled_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, factor = kept
    return scaled(gradient, factor), (gradient * x).sum(0, keepdims=True)


scaled.defvjp(scaled_forward, scaled_backward)


class Scale(nnx.Module):
    """A layer of a user's own: a Pallas kernel with a derivative of its own."""

    def __init__(self, size: int, *, rngs: nnx.Rngs) -> None:
        self.factor = nnx.Param(jnp.ones((1, size)))
        self.linear = nnx.Linear(size, size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return scaled(self.linear(x), self.factor[...])


def squares(output: jax.Array, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return optax.squared_error(output, batch["targets"]).sum(), jnp.float32(output.shape[0])


@platforms
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_layer_with_a_kernel_and_a_derivative_of_its_own_compiles(platform: str, schedule: str) -> None:
    batch = {name: np.zeros((32, 128), np.float32) for name in ("inputs", "targets")}
    task = Task([lambda rngs: Scale(128, rngs=rngs)] * 2, squares, batch=batch)
    programs = compiled(model_of(task, platform, Layout(config={"schedule": schedule})), platform)
    kernels = [said.custom_calls for (_, name), said in programs.items() if name in (*FORWARDS, *BACKWARDS)]
    assert any(kernels)
