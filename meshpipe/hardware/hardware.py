"""One kind of device, described by its rates, its memory and the links between its devices."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from meshpipe.errors import ArgumentError, check_whole, is_number

Platform = Literal["tpu", "gpu", "cpu"]

EFFICIENCIES = ("products", "memory", "links", "network")
"""What `Hardware.efficiency` has a share for."""
_TEXTS = ("name", "platform", "device_kind")
_RATES = ("memory_bandwidth", "host_link", "network_link")
_COUNTS = ("memory_bytes", "devices_per_host", "joined_devices", "links")
_LATENCIES = ("host_latency", "network_latency")
_MOST_CHIPS = 1 << 24
_LARGEST = 1 << 62
"""XLA keeps sizes in 64 bits."""
_WORDS = ("topology_name", "megacore", "compute_capability")
"""What `Hardware.compiler` has besides numbers."""
_NEEDED = (*_TEXTS, "flops", *_COUNTS[:2], *_RATES, *_LATENCIES, "efficiency")


@dataclass(frozen=True, kw_only=True)
class Slices:
    """Which slices of a TPU pod exist."""

    dims: int
    """Number of dims of a slice's shape: of a 2-D or 3-D torus of chips."""
    shapes: tuple[str, ...]
    """Shapes that exist, such as `2x2x1`."""
    multiple: int | None = None
    """Shapes whose every dim is a multiple of this exist as well."""
    most: int
    """The most chips of a slice."""
    devices_per_chip: int = 1
    one_host: str | None = None
    """The largest slice that one host can have, where that is more than hosts of larger slices have."""

    @classmethod
    def of(cls, values: Any) -> "Slices":
        """Raises `ArgumentError` for values that are missing, unknown, or not what they must be."""
        known, needed = {f.name for f in fields(cls)}, {"dims", "shapes", "most"}
        if not isinstance(values, Mapping) or not needed <= values.keys() <= known:
            raise ArgumentError(f"slices must have dims, shapes and most, and may have others. Got {values!r:.100}.")
        for name in ("dims", "most", "multiple", "devices_per_chip"):
            if values.get(name) is not None:
                check_whole(name, values[name], below=_MOST_CHIPS)
        shapes, one_host = values["shapes"], values.get("one_host")
        pattern = rf"[1-9]\d{{0,4}}(x[1-9]\d{{0,4}}){{{values['dims'] - 1}}}"
        listed = list(shapes) if isinstance(shapes, list | tuple) and shapes else [shapes]
        for text in listed if one_host is None else [*listed, one_host]:
            if not isinstance(text, str) or not re.fullmatch(pattern, text):
                raise ArgumentError(
                    f"shapes must be a list of texts, each of {values['dims']} dims. Got {text!r:.100}."
                )
        return cls(**{**values, "shapes": tuple(shapes)})


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, and how such devices are joined. Every number is of one device, as JAX counts them."""

    name: str
    """What a target calls it, such as `h100`."""
    platform: Platform
    """What JAX calls its platform."""
    device_kind: str
    """The beginning of `jax.Device.device_kind`; for GPUs, also the name that XLA compiles for."""
    other_kinds: tuple[str, ...] = ()
    """Other beginnings of it."""
    flops: Mapping[str, float]
    """Peak FLOP/s by dtype of the operands of a matrix product, without sparsity."""
    memory_bytes: int
    memory_bandwidth: float
    """Bytes per second."""
    host_link: float
    """Bytes per second that a device sends to the devices that it is joined with, over all of its `links` at once."""
    links: int = 1
    """Of how many links that is the sum. One means a switch, or a bus. A chip of a torus has two in each dim: a
    transfer to its neighbour uses one, and a collective over a mesh axis that lies along one dim uses two."""
    network_link: float
    """Bytes per second that a device sends to the devices beyond those that it is joined with."""
    host_latency: float
    """Seconds of one hop of a transfer or collective between joined devices."""
    network_latency: float
    """Seconds of one hop beyond them."""
    devices_per_host: int
    joined_devices: int
    """How many devices the fast links join: those of a host, of several hosts with one NVLink, of a TPU pod."""
    efficiency: Mapping[str, float]
    """The share of each peak that real programs reach: of `products`, `memory`, `links` and `network`."""
    alone: float = 1.0
    """How many times as fast a device computes while the others of its host idle. 1 for devices of their own; more for
    virtual devices, which share the cores of a host: rates are those with all of them busy."""
    slices: Slices | None = None
    """Which slices exist, of a TPU."""
    compiler: Mapping[str, Any] = field(default_factory=dict)
    """What XLA asks of a device that is not there."""
    sources: tuple[str, ...] = ()
    """Where the numbers are from."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Hardware":
        """The description with the values of a JSON object.

        Raises `ArgumentError` for values that are missing, unknown, or not what they must be.
        """
        known = [f.name for f in fields(cls)]
        unknown = [name for name in values if name not in known]
        missing = [name for name in _NEEDED if name not in values]
        if unknown or missing:
            lacks = f"lacks {', '.join(missing)}" if missing else f"has unknown {', '.join(unknown)}"
            raise ArgumentError(f"A described machine must have {', '.join(_NEEDED)}. This one {lacks}.")
        given = {"joined_devices": values["devices_per_host"], **values}
        _check(given)
        for name in (*_RATES, *_LATENCIES, *(["alone"] if "alone" in given else [])):
            given[name] = float(given[name])
        for name in ("flops", "efficiency"):
            given[name] = {key: float(value) for key, value in given[name].items()}
        for name in ("other_kinds", "sources"):
            given[name] = tuple(given.get(name, ()))
        if given.get("slices") is not None:
            given["slices"] = Slices.of(given["slices"])
        return cls(**given)

    @property
    def axis_link(self) -> float:
        """Bytes per second that a device sends in a collective over one mesh axis of joined devices."""
        return self.host_link if self.links == 1 else self.host_link * min(2, self.links) / self.links

    @property
    def neighbour_link(self) -> float:
        """Bytes per second from a device to one that it is joined with."""
        return self.host_link / self.links

    def rate(self, dtype: str) -> float:
        """FLOP/s of products of this dtype; of a dtype that has none of its own, those of the slowest that has."""
        return self.flops.get(dtype, min(self.flops.values(), default=math.nan))


def _check(values: Mapping[str, Any]) -> None:
    for name in _TEXTS:
        if not isinstance(values[name], str) or not values[name]:
            raise ArgumentError(f"{name} must be a text. Got {values[name]!r}.")
    if values["platform"] not in get_args(Platform):
        raise ArgumentError(f"platform must be one of {', '.join(get_args(Platform))}. Got {values['platform']!r}.")
    for name in _RATES:
        if not is_number(values[name], _LARGEST) or values[name] == 0:
            raise ArgumentError(f"{name} must be a number above 0 and below 2^62. Got {values[name]!r}.")
    for name in _COUNTS:
        if name in values:
            check_whole(name, values[name])
            if values[name] >= _LARGEST:
                raise ArgumentError(f"{name} must be below 2^62. Got {values[name]}.")
    for name in _LATENCIES:
        if not is_number(values[name]):
            raise ArgumentError(f"{name} must be a number of seconds, at least 0. Got {values[name]!r}.")
    alone = values.get("alone", 1.0)
    if not is_number(alone) or alone < 1:
        raise ArgumentError(f"alone must be a number, at least 1. Got {alone!r}.")
    for name in ("other_kinds", "sources"):
        found = values.get(name, [])
        if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
            raise ArgumentError(f"{name} must be a list of texts. Got {found!r:.100}.")
    if values.get("slices") is not None and values["platform"] != "tpu":
        raise ArgumentError(f"slices are those of a TPU. Got them for the platform {values['platform']!r}.")
    _check_compiler(values.get("compiler", {}))
    flops, efficiency = values["flops"], values["efficiency"]
    if not isinstance(flops, Mapping) or not flops:
        raise ArgumentError(f'flops must give FLOP/s by dtype, such as {{"bfloat16": 1e14}}. Got {flops!r}.')
    for dtype, rate in flops.items():
        if not is_number(rate) or rate == 0:
            raise ArgumentError(f"flops of {dtype} must be a number above 0. Got {rate!r}.")
    for name in EFFICIENCIES:
        share = efficiency.get(name) if isinstance(efficiency, Mapping) else None
        if not is_number(share) or not 0 < share <= 1:  # type: ignore[operator]
            raise ArgumentError(f"efficiency of {name} must be above 0 and at most 1. Got {share!r}.")


def _check_compiler(found: object) -> None:
    """What XLA asks for is written into a text of its own form, so only words and numbers may be in it. XLA checks no
    number: some end the process.
    """
    if not isinstance(found, Mapping):
        raise ArgumentError(f"compiler must be an object. Got {found!r:.100}.")
    for name, value in found.items():
        if not re.fullmatch(r"\w+", name) or (name in _WORDS and not re.fullmatch(r"[\w.+-]+", str(value))):
            raise ArgumentError(f"compiler must have words and numbers. Got {value!r:.100} for {name!r:.60}.")
        if name not in _WORDS and (not is_number(value, _LARGEST) or value == 0):
            raise ArgumentError(f"{name} of compiler must be a number above 0. Got {value!r:.100}.")
        if name not in (*_WORDS, "clock_rate_ghz") and value != int(value):
            raise ArgumentError(f"{name} of compiler must be a whole number. Got {value!r}.")
    capability = found.get("compute_capability", "1.0")
    if not isinstance(capability, str) or not re.fullmatch(r"\d{1,3}\.\d{1,3}", capability):
        raise ArgumentError(f'compute_capability must be a text such as "9.0". Got {capability!r}.')
