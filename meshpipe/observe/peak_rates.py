"""Peak rates of known accelerators, for the utilisation of a run."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from meshpipe.hardware.catalogue import hardware_of


@runtime_checkable
class Device(Protocol):
    """What this module and its neighbours read of a `jax.Device`."""

    @property
    def device_kind(self) -> str: ...
    @property
    def process_index(self) -> int: ...
    def memory_stats(self) -> dict[str, Any] | None: ...


def peak_rates(device: Device) -> Mapping[str, float]:
    """The device's FLOP/s by dtype of the operands of a product; empty where they are not known, as on CPU.

    Products of float32 run as tfloat32 on NVIDIA GPUs from A100 on, and in one bfloat16 pass on TPUs, unless JAX's
    `default_matmul_precision` asks for more.
    """
    hardware = hardware_of(device.device_kind)
    return {} if hardware is None else hardware.flops
