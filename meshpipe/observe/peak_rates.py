"""Peak rates of known accelerators, for the utilisation of a run."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

_TERA = 1e12

# Dense rates of one JAX device, without sparsity. Sources: NVIDIA's data sheets of the B200, H200, H100, A100, L40S, L4
# and V100 Tensor Core GPUs; the pages "TPU v2" to "TPU v6e" of the Cloud TPU documentation. Products of float32 run as
# tfloat32 on NVIDIA GPUs from A100 on, and in one bfloat16 pass on TPUs, unless JAX's `default_matmul_precision` asks
# for more. A chip of TPU v2 or v3 is two devices.
_PEAKS: Mapping[str, Mapping[str, float]] = {
    "NVIDIA B200": {"bfloat16": 2250, "float16": 2250, "float32": 1125},
    "NVIDIA H200": {"bfloat16": 989.4, "float16": 989.4, "float32": 494.7},
    "NVIDIA H100 NVL": {"bfloat16": 835, "float16": 835, "float32": 417.5},
    "NVIDIA H100 PCIe": {"bfloat16": 756, "float16": 756, "float32": 378},
    "NVIDIA H100": {"bfloat16": 989.4, "float16": 989.4, "float32": 494.7},
    "NVIDIA A100": {"bfloat16": 312, "float16": 312, "float32": 156},
    "NVIDIA L40S": {"bfloat16": 362, "float16": 362, "float32": 183},
    "NVIDIA L4": {"bfloat16": 121, "float16": 121, "float32": 60},
    "Tesla V100": {"float16": 125, "float32": 15.7},
    "TPU v6 lite": {"bfloat16": 918, "float32": 918},
    "TPU v6e": {"bfloat16": 918, "float32": 918},
    "TPU v5 lite": {"bfloat16": 197, "float32": 197},
    "TPU v5e": {"bfloat16": 197, "float32": 197},
    "TPU v5": {"bfloat16": 459, "float32": 459},
    "TPU v4": {"bfloat16": 275, "float32": 275},
    "TPU v3": {"bfloat16": 61.5, "float32": 61.5},
    "TPU v2": {"bfloat16": 22.5, "float32": 22.5},
}
"""TFLOP/s by the beginning of a device's kind, and by dtype; of several that match, the longest counts."""


@runtime_checkable
class Device(Protocol):
    """What this module and its neighbours read of a `jax.Device`."""

    @property
    def device_kind(self) -> str: ...
    @property
    def process_index(self) -> int: ...
    def memory_stats(self) -> dict[str, Any] | None: ...


def peak_rates(device: Device) -> Mapping[str, float]:
    """The device's FLOP/s by dtype of the operands of a product; empty where they are not known, as on CPU."""
    matching = [kind for kind in _PEAKS if device.device_kind.startswith(kind)]
    if not matching:
        return {}
    return {dtype: rate * _TERA for dtype, rate in _PEAKS[max(matching, key=len)].items()}
