"""Which implementation computes attention: the one place that chooses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from meshpipe.errors import ArgumentError

AttentionName = Literal["auto", "xla", "cudnn"]
"""How attention is computed: by XLA, which writes the scores of all pairs of positions to memory; by the fused kernel
of cuDNN, which does not; or `auto`, by cuDNN where devices, dtype and head size allow it."""

HEAD_DIM_STEP = 8
"""cuDNN takes head sizes that are multiples of this."""

NEWEST = 9.0
"""The compute capability of a GPU that is only described."""

NO_SOFTCAP = "cuDNN does not cap scores"

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


def attend(
    query: Float[Array, "batch seq heads head_dim"],
    key: Float[Array, "batch seq2 kv_heads head_dim"],
    value: Float[Array, "batch seq2 kv_heads head_dim"],
    *,
    causal: bool,
    segment_ids: Int[Array, "batch seq"] | None = None,
    mask: Bool[Array, "batch 1 seq seq2"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: AttentionName = "auto",
) -> Float[Array, "batch seq heads head_dim"]:
    """Every query's mean of the values, weighted by the softmax of its scores: products with the keys.

    Arguments:
        query: Queries; equal groups of their heads share a head of keys and values.
        key: Keys, as many as values.
        value: What is averaged.
        causal: Whether position i attends only to positions j <= i.
        segment_ids: Positions attend only to those of an equal id. Queries and keys are then as many.
        mask: Position i attends to position j only where `mask[:, :, i, j]`.
        window: Position i attends only to positions j > i - window.
        softcap: Scores become softcap * tanh(score / softcap), which is within +-softcap.
        scale: The factor of scores; None is head_dim ** -0.5.
        implementation: What computes it, by the name in the config.

    Raises `ValueError` when `implementation` cannot compute it.
    """
    if segment_ids is not None:
        together = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
        mask = together if mask is None else mask & together
    odd_mask = mask is not None and query.shape[1] % 2 == 1
    chosen = choose_attention(
        implementation, dtype=query.dtype, head_dim=query.shape[-1], odd_mask=odd_mask, softcap=softcap is not None
    )
    if softcap is not None:
        return _capped(query, key, value, _mask(query, key, causal, mask, window), softcap, scale)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0 if causal else key.shape[1]),
        implementation=chosen,
    )


def _mask(
    query: jax.Array, key: jax.Array, causal: bool, mask: jax.Array | None, window: int | None
) -> Bool[Array, "*batch_and_1 seq seq2"] | None:
    """Which positions attend to which, all rules together; None is all to all."""
    ahead = jnp.arange(query.shape[1])[:, None] - jnp.arange(key.shape[1])
    if causal:
        mask = ahead >= 0 if mask is None else mask & (ahead >= 0)
    if window is not None:
        mask = ahead < window if mask is None else mask & (ahead < window)
    return mask


def _capped(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    softcap: float,
    scale: float | None,
) -> jax.Array:
    """Attention whose scores are capped, by XLA: `jax.nn.dot_product_attention` has no cap."""
    query = rearrange(query, "batch seq (kv group) dim -> batch seq kv group dim", kv=key.shape[2])
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", query, key, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores * (key.shape[-1] ** -0.5 if scale is None else scale) / softcap)
    if mask is not None:
        scores = jnp.where(mask if mask.ndim == 2 else mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value)
    return rearrange(mixed, "batch seq kv group dim -> batch seq (kv group) dim")


def choose_attention(
    asked: AttentionName,
    *,
    dtype: Any,
    head_dim: int,
    device: Device | None = None,
    odd_mask: bool = False,
    softcap: bool = False,
) -> Literal["xla", "cudnn"]:
    """The implementation for `jax.nn.dot_product_attention`.

    Arguments:
        asked: What the config says.
        dtype: The dtype of queries, keys and values.
        head_dim: The number of features of a head.
        device: A device that will run it. None is one of the mesh that `jax.set_mesh` has set while the layer is
            traced, or of JAX's default devices.
        odd_mask: Whether there is a mask of an odd number of positions.
        softcap: Whether scores are capped.

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
    if reason is None and softcap:
        reason = NO_SOFTCAP
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
