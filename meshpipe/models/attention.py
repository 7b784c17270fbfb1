"""Which implementation computes attention: the one place that chooses."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from meshpipe.compiler.described_cudnn import answer_for_described
from meshpipe.errors import ArgumentError
from meshpipe.hardware.catalogue import described_hardware
from meshpipe.models.splash import LANES, splash_attention

AttentionName = Literal["auto", "xla", "cudnn", "pallas"]
"""How attention is computed: by XLA, which writes the scores of all pairs of positions to memory; by a fused kernel
that does not, cuDNN's on NVIDIA GPUs or JAX's Pallas kernel on TPUs; or `auto`, by the kernel of the devices where
dtype and sizes allow it."""

Implementation = Literal["xla", "cudnn", "pallas"]

NAMES: Mapping[Implementation, str] = {"xla": "XLA", "cudnn": "cuDNN", "pallas": "Pallas"}

HEAD_DIM_STEP = 8
"""cuDNN takes head sizes that are multiples of this."""

NEWEST = 9.0
"""The compute capability of a GPU that nothing is known of."""


@runtime_checkable
class Device(Protocol):
    """What is read of a device, be it there or described by a mesh."""

    @property
    def platform(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


_standing_in: list[Device | None] = []
"""What CPU devices stand in for, once for each time that `cpu_devices_stand_in` is entered."""


@contextmanager
def cpu_devices_stand_in(device: Device | None = None) -> Iterator[None]:
    """While entered, CPU devices stand in for those that will run a model. In place of a known `device`, layers are
    traced with its attention, and cannot run; else they compute attention by XLA, whatever is asked for.
    """
    _standing_in.append(device)
    try:
        yield
    finally:
        _standing_in.pop()


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
    chosen = choose_attention(
        implementation,
        dtype=query.dtype,
        head_dim=query.shape[-1],
        softcap=softcap is not None,
        call=Call(
            queries=query.shape[1],
            keys=key.shape[1],
            segments=segment_ids is not None,
            mask=mask is not None,
            looks_ahead=window is not None and not causal,
        ),
    )
    if chosen == "pallas":
        interpret = traced_device().platform == "cpu"
        rules: Any = {"causal": causal, "segment_ids": segment_ids, "window": window, "softcap": softcap}
        return splash_attention(query, key, value, **rules, scale=scale, interpret=interpret)
    mask = _of_documents(segment_ids, mask)
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


def _of_documents(segment_ids: jax.Array | None, mask: jax.Array | None) -> jax.Array | None:
    """The mask, within documents alone."""
    if segment_ids is None:
        return mask
    together = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return together if mask is None else mask & together


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


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one call of `attend` asks for, beyond what a model's config says."""

    queries: int
    keys: int
    segments: bool = False
    mask: bool = False
    """Whether there is a mask beside the segments."""
    looks_ahead: bool = False
    """Whether there is a window, and positions attend to later ones."""


def choose_attention(
    asked: AttentionName,
    *,
    dtype: Any,
    head_dim: int,
    softcap: bool = False,
    device: Device | None = None,
    call: Call | None = None,
) -> Implementation:
    """What computes attention.

    Arguments:
        asked: What the config says.
        dtype: The dtype of queries, keys and values.
        head_dim: The number of features of a head.
        softcap: Whether scores are capped.
        device: A device that will run it. None is one of the mesh that `jax.set_mesh` has set while the layer is
            traced, or of JAX's default devices.
        call: What is asked of it; None for what most calls ask.

    Raises `ValueError` when a kernel is asked for and cannot be had.
    """
    if asked == "xla":
        return "xla"
    device = traced_device() if device is None else device
    kernel = kernel_of(device)
    if asked == "auto" and (kernel is None or (kernel == "pallas" and call is not None and _is_short(call))):
        return "xla"
    wanted: Implementation = kernel if asked == "auto" and kernel is not None else asked  # type: ignore[assignment]
    reason = why_not(wanted, dtype=dtype, head_dim=head_dim, softcap=softcap, device=device, call=call)
    if reason is not None and asked != "auto":
        raise ArgumentError(
            f"`attention` {asked} must suit devices and sizes: {reason}. Choose `attention` auto or xla.", "model"
        )
    return "xla" if reason is not None or stands_in(device) else wanted


def why_not(
    kernel: Implementation, *, dtype: Any, head_dim: int, softcap: bool, device: Device, call: Call | None = None
) -> str | None:
    """Why a kernel cannot compute it on a device; None if it can. CPU devices that stand in have all kernels."""
    if not stands_in(device) and kernel_of(device) != kernel:
        needed = {"cudnn": "an NVIDIA GPU", "pallas": "a TPU"}[kernel]
        return f"{NAMES[kernel]} needs {needed}, and these are {device.platform} devices"
    if kernel == "pallas":
        return _why_not_pallas(dtype, call)
    return _why_not_cudnn(dtype, head_dim, softcap, device, call)


def kernel_of(device: Device) -> Implementation | None:
    """The fused kernel that such devices have."""
    if device.platform == "tpu":
        return "pallas"
    is_amd = any(name in device.device_kind for name in ("AMD", "Radeon", "gfx"))
    return "cudnn" if device.platform == "gpu" and not is_amd else None


def stands_in(device: Device) -> bool:
    """Whether this is a CPU device in place of an unknown one."""
    return bool(_standing_in) and device.platform == "cpu"


def _is_short(call: Call) -> bool:
    """Whether the sequences are shorter than what the Pallas kernel would pad them to."""
    return min(call.queries, call.keys) < LANES


def _why_not_pallas(dtype: Any, call: Call | None) -> str | None:
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"Pallas computes in bfloat16 or float32, and the model in {jnp.dtype(dtype).name}"
    return "its kernel takes segment_ids, and no other mask" if call is not None and call.mask else None


def _why_not_cudnn(dtype: Any, head_dim: int, softcap: bool, device: Device, call: Call | None) -> str | None:
    capability = NEWEST if stands_in(device) else _compute_capability(device)
    if capability < 8:
        return f"cuDNN needs a GPU of compute capability 8.0 or above, and this is a {device.device_kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN computes in bfloat16 or float16, and the model in {jnp.dtype(dtype).name}"
    # Of gradients, by the support matrix of cuDNN 9.18 (docs.nvidia.com/cudnn). JAX takes 256 on newer GPUs too, where
    # cuDNN then refuses to run them.
    largest = 256 if 9 <= capability < 10 else 128
    if head_dim % HEAD_DIM_STEP or head_dim > largest:
        sizes = f"a multiple of {HEAD_DIM_STEP} features, at most {largest}"
        return f"cuDNN needs heads with {sizes}, and these have {head_dim}"
    if _is_described(device) and not answer_for_described(_described_capability):
        return "this JAX writes cuDNN's attention only on the GPU"
    if softcap:
        return "cuDNN does not cap scores"
    if call is not None and (call.segments or call.mask) and (call.queries % 2 or call.keys % 2):
        return "with a mask, cuDNN needs an even number of positions"
    if call is not None and call.looks_ahead:
        return "cuDNN has windows only where positions attend to earlier ones"
    return None


def traced_device() -> Device:
    """A device that the program being traced is for."""
    described = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device: Device = jax.devices()[0] if described is None else described
    known = _standing_in[-1] if stands_in(device) else None
    return device if known is None else known


def _described_capability() -> float | None:
    """The compute capability of the GPU that is traced for, where this process has none of its kind."""
    device = traced_device()
    return _compute_capability(device) if _is_described(device) else None


def _compute_capability(device: Device) -> float:
    """Of a GPU that is here, or that the catalogue or a file of machines describes; of any other, that of a new one."""
    found = device if hasattr(device, "compute_capability") else _here(device)
    text = getattr(found, "compute_capability", None)
    if text is None:
        described = described_hardware(device.device_kind)
        text = described.compiler.get("compute_capability") if described is not None else None
    return float(text) if text else NEWEST


def _is_described(device: Device) -> bool:
    return device.platform == "gpu" and _here(device) is None


def _here(device: Device) -> Any:
    """A device of this kind in this process; None if it has none."""
    return next((d for d in jax.devices() if d.device_kind == device.device_kind), None)
