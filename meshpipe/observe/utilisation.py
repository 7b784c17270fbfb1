"""How much of the devices' peak rates a step uses, and the peak of their memory."""

import json
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from meshpipe.layers.staged_model import StagedModel
from meshpipe.observe.peak_rates import Device, peak_rates
from meshpipe.processes.group import Group
from meshpipe.stage.products_of_step import products_of_step, total_products

GATHER_SECONDS = 600.0
"""How long processes wait for each other's counts at the start of a run."""


def model_flops(model: StagedModel, group: Group) -> dict[str, float]:
    """The floating-point operations of a step by dtype: the products of forward, and of the gradients that are made
    (`products_of_step`).

    Recomputed work does not count, nor what custom calls do, other than cuDNN's attention. Every process of the group
    calls it once.
    """
    own = products_of_step(model.traced, model.config.num_microbatches)
    by_stage: dict[str, Mapping[str, float]] = {}
    for text in group.gather("flops", json.dumps({str(s): counts for s, counts in own.items()}), GATHER_SECONDS):
        by_stage |= json.loads(text)
    return total_products(by_stage.values())


class Utilisation:
    """Compares the operations of a step with what the devices of its mesh could do in that time."""

    def __init__(self, flops: Mapping[str, float], devices: Sequence[Device]) -> None:
        self.flops, self._count = sum(flops.values()), len(devices)
        rates = peak_rates(devices[0])
        is_known = bool(flops) and all(dtype in rates for dtype in flops)
        self._seconds = sum(n / rates[dtype] for dtype, n in flops.items()) / self._count if is_known else None
        """The shortest time of a step, if every device ran at its peak; None where the peak is not known."""

    def of(self, seconds: float) -> dict[str, float]:
        """The rate of a step that took so long, and the share of the peak where that is known."""
        values = {"model_flops_per_s_per_device": self.flops / seconds / self._count} if self.flops else {}
        return values if self._seconds is None else values | {"model_flops_utilisation": self._seconds / seconds}


class PeakMemory:
    """The most bytes that each of this process's devices has held; of the process itself where devices do not tell."""

    def __init__(self, devices: Sequence[Device]) -> None:
        own = [device for device in devices if device.process_index == jax.process_index()]
        self._devices = [device for device in own if _peak_of(device) is not None]

    def values(self) -> dict[str, Any]:
        if self._devices:
            return {"peak_memory_bytes": [_peak_of(device) for device in self._devices]}
        unit = 1 if sys.platform == "darwin" else 1024
        return {"peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _peak_of(device: Device) -> int | None:
    return (device.memory_stats() or {}).get("peak_bytes_in_use")
