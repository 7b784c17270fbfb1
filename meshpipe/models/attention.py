"""Which implementation computes attention: the one place that chooses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from meshpipe.errors import ArgumentError

AttentionName = Literal["auto", "xla", "cudnn"]
"""How attention is computed: by XLA, which writes the scores of all pairs of positions to memory; by the fused kernel
of cuDNN, which does not; or `auto`, by cuDNN where devices, dtype and head size allow it."""

HEAD_DIM_STEP = 8
"""cuDNN takes head sizes that are multiples of this."""

NEWEST = 9.0
"""The compute capability of a GPU that is only described."""

_standing_in = 0
"""How often `cpu_devices_stand_in` is entered."""


@contextmanager
def cpu_devices_stand_in() -> Iterator[None]:
    """While entered, CPU devices stand in for those that will run a model: they compute attention by XLA, whatever is
    asked for.
    """
    global _standing_in
    _standing_in += 1
    try:
        yield
    finally:
        _standing_in -= 1


@runtime_checkable
class Device(Protocol):
    """What is read of a device, be it there or described by a mesh."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


def choose_attention(
    asked: AttentionName, *, dtype: Any, head_dim: int, device: Device | None = None, odd_mask: bool = False
) -> Literal["xla", "cudnn"]:
    """The implementation for `jax.nn.dot_product_attention`.

    Arguments:
        asked: What the config says.
        dtype: The dtype of queries, keys and values.
        head_dim: The number of features of a head.
        device: A device that will run it. None is one of the mesh that `jax.set_mesh` has set while the layer is
            traced, or of JAX's default devices.
        odd_mask: Whether there is a mask of an odd number of positions.

    Raises `ValueError` when `cudnn` is asked for and cannot be had.
    """
    if asked == "xla":
        return "xla"
    device = traced_device() if device is None else device
    if stands_in(device):
        reason = why_not_sizes(dtype, head_dim, NEWEST)
    else:
        reason = why_not_cudnn(dtype, head_dim, device)
    if reason is None and odd_mask:
        reason = "with a mask, cuDNN needs an even number of positions"
    if reason is not None and asked == "cudnn":
        raise ArgumentError(
            f"`attention` cudnn must suit devices and sizes: {reason}. Choose `attention` auto or xla.", "model"
        )
    return "cudnn" if reason is None and not stands_in(device) else "xla"


def stands_in(device: Device) -> bool:
    """Whether this is a CPU device in place of an unknown one."""
    return _standing_in > 0 and device.platform == "cpu"


def why_not_cudnn(dtype: Any, head_dim: int, device: Device) -> str | None:
    """Why cuDNN cannot compute it; None if it can."""
    if device.platform != "gpu" or any(name in device.device_kind for name in ("AMD", "Radeon", "gfx")):
        found = "this plan is laid out on CPU" if stands_in(device) else f"these are {device.platform}"
        return f"cuDNN needs an NVIDIA GPU, and {found} devices"
    capability = _compute_capability(device)
    if capability < 8:
        return f"cuDNN needs a GPU of compute capability 8.0 or above, and this is a {device.device_kind}"
    return why_not_sizes(dtype, head_dim, capability)


def why_not_sizes(dtype: Any, head_dim: int, capability: float) -> str | None:
    """Why cuDNN cannot compute it on an NVIDIA GPU of this compute capability; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN computes in bfloat16 or float16, and the model in {jnp.dtype(dtype).name}"
    largest = 256 if capability >= 9 else 128
    if head_dim % HEAD_DIM_STEP or head_dim > largest:
        sizes = f"a multiple of {HEAD_DIM_STEP} features, at most {largest}"
        return f"cuDNN needs heads with {sizes}, and these have {head_dim}"
    return None


def traced_device() -> Device:
    """A device that the program being traced is for."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device: Device = jax.devices()[0] if described is None else described
    return device


def _compute_capability(device: Device) -> float:
    """Of a GPU that is there; one that is only described counts as new."""
    alike = (d for d in jax.devices() if d.device_kind == device.device_kind)
    text = getattr(device, "compute_capability", None) or getattr(next(alike, None), "compute_capability", None)
    return float(text) if text else NEWEST
