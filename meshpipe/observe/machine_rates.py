"""Measures the devices of this process: products, memory and links, as a description of the machine has them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.hardware.catalogue import hardware_of
from meshpipe.hardware.hardware import Hardware
from meshpipe.machine import host_memory
from meshpipe.phases import phase

DTYPES = ("bfloat16", "float32")
_SECONDS, _MOST = 0.5, 30
"""How long, and how often at most, each thing is measured."""
_REDUCES = 16
"""All-reduces of the program that shows what one takes."""
_ALONE = "Only one device was there: its links are those of the known machine, or were assumed to be as fast as memory."


def measure_machine(name: str, devices: Sequence[jax.Device]) -> dict[str, Any]:
    """A description of these devices with the rates that they reach together, as the file of a target has it.

    What cannot be measured in one process, such as the network between hosts, is that of the known machine, or that
    inside the host; `sources` says so. Takes about ten seconds.
    """
    first, known = devices[0], hardware_of(devices[0].device_kind)
    mesh = Mesh(np.asarray(devices, dtype=object), ("device",))
    with phase("Measuring products"):
        products = {dtype: _products(mesh, dtype) for dtype in DTYPES}
        alone = _alone(mesh, products)
    with phase("Measuring memory"):
        bandwidth = _bandwidth(mesh)
    with phase("Measuring links"):
        link, latency = _link(devices) if len(devices) > 1 else (None, None)
        reduced = _all_reduce(mesh) if len(devices) > 1 else None
        hop = _hop(mesh) if len(devices) > 1 else 0.0
    # Against the data sheet where there is one, so that the shares are those of its peaks.
    peaks = {dtype: max(rate, (known.flops if known else {}).get(dtype, 0.0)) for dtype, rate in products.items()}
    peak_bandwidth = max(bandwidth, known.memory_bandwidth if known else 0.0)
    host_link = max(link or 0.0, known.host_link if known else 0.0) or bandwidth
    # Collectives take most of what links do: the share is theirs, where a single transfer may be faster.
    share = None if reduced is None else min(1.0, reduced / host_link)
    return {
        "name": name,
        "platform": {"cuda": "gpu", "rocm": "gpu"}.get(first.platform, first.platform),
        "device_kind": first.device_kind,
        "flops": peaks,
        "memory_bytes": _memory(devices),
        "memory_bandwidth": peak_bandwidth,
        "host_link": host_link,
        "links": known.links if known else 1,
        "network_link": known.network_link if known else host_link,
        "host_latency": max(latency, hop) if latency is not None else known.host_latency if known else 1e-5,
        "network_latency": known.network_latency if known else latency or 1e-5,
        "devices_per_host": len(devices),
        "joined_devices": known.joined_devices if known else len(devices),
        "efficiency": {
            "products": min(products[dtype] / peaks[dtype] for dtype in DTYPES),
            "memory": bandwidth / peak_bandwidth,
            "links": share if share is not None else known.efficiency["links"] if known else 1.0,
            "network": known.efficiency["network"] if known else 1.0,
        },
        **({"alone": alone} if alone > 1 else {}),
        **_from_catalogue(known),
        "sources": _sources(devices, known, alone=link is None),
    }


def _from_catalogue(known: Hardware | None) -> dict[str, Any]:
    if known is None:
        return {}
    slices = None if known.slices is None else asdict(known.slices)
    return {"compiler": dict(known.compiler), **({} if slices is None else {"slices": slices})}


def _sources(devices: Sequence[jax.Device], known: Hardware | None, *, alone: bool) -> list[str]:
    count = f"{len(devices)} {devices[0].device_kind} device{'s' if len(devices) > 1 else ''}"
    said = [f"Measured by meshpipe with jax {jax.__version__} on {count}, all of them busy at once."]
    if known is not None:
        said.append(f"Peaks, network and what XLA asks for are those of {known.name}, unless more was measured.")
    else:
        said.append("The network between hosts was not measured: it is assumed to be as fast as the links inside.")
    return [*said, *([_ALONE] if alone else [])]


def _products(mesh: Mesh, dtype: str) -> float:
    """FLOP/s of one device in the product of two square matrices."""
    size = 1024 if mesh.devices.flat[0].platform == "cpu" else 8192
    a = _filled(mesh, (size, size), dtype)
    run = jax.jit(lambda a: jnp.einsum("dik,dkj->dij", a, a))
    return 2.0 * size**3 / _seconds(lambda: run(a))


def _alone(mesh: Mesh, products: Mapping[str, float]) -> float:
    """How many times as fast one device is while the others idle, of those that share the cores of this machine."""
    if mesh.devices.flat[0].platform != "cpu" or mesh.size == 1:
        return 1.0
    first = Mesh(mesh.devices[:1], mesh.axis_names)
    return min(float(mesh.size), max(1.0, _products(first, "float32") / products["float32"]))


def _bandwidth(mesh: Mesh) -> float:
    """Bytes per second that one device reads and writes, in place as an update does."""
    count = 2**24 if mesh.devices.flat[0].platform == "cpu" else 2**27
    held = [_filled(mesh, (count,), "float32")]
    run = jax.jit(lambda x: x + 1.0, donate_argnums=0)

    def once() -> jax.Array:
        held[0] = run(held[0])
        return held[0]

    return 2.0 * 4 * count / _seconds(once)


def _link(devices: Sequence[jax.Device]) -> tuple[float, float]:
    """Bytes per second from a device to its neighbour, and seconds of a small transfer."""
    large, small = (jax.device_put(np.zeros(count, np.float32), devices[0]) for count in (2**24, 1))
    rate = large.nbytes / _seconds(lambda: jax.device_put(large, devices[1], may_alias=False))
    return rate, _seconds(lambda: jax.device_put(small, devices[1], may_alias=False))


def _all_reduce(mesh: Mesh) -> float:
    """Bytes per second that a device sends in an all-reduce over all of them, as by a ring."""
    count, devices = 2**22, mesh.size
    x = _filled(mesh, (count,), "float32")
    run = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return 2.0 * (devices - 1) / devices * 4 * count / _seconds(lambda: run(x))


def _hop(mesh: Mesh) -> float:
    """Seconds of a hop of a small all-reduce between products, with the time until the last device has come to it."""
    a = _filled(mesh, (256, 256), "float32")

    @partial(jax.jit, static_argnums=1)
    def run(a: jax.Array, reduces: bool) -> jax.Array:
        for _ in range(_REDUCES):
            a = jnp.einsum("dik,dkj->dij", a, a)
            a = 0.5 * a + (a[:, :1, :1].sum(0) if reduces else a[:, :1, :1])
        return a

    longer = _seconds(lambda: run(a, True)) - _seconds(lambda: run(a, False))
    return max(0.0, longer) / _REDUCES / (2 * math.ceil(math.log2(mesh.size)))


def _filled(mesh: Mesh, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """An array of this shape on each device."""
    sharding = NamedSharding(mesh, PartitionSpec("device"))
    fill = jax.jit(lambda: jnp.full((mesh.size, *shape), 1e-3, dtype), out_shardings=sharding)
    return fill()


def _seconds(call: Callable[[], Any]) -> float:
    """The time of the fastest call, after one that does not count: what else runs on the machine only adds to it."""
    jax.block_until_ready(call())
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _SECONDS and len(times) < _MOST):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def _memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that a device may allocate; virtual CPU devices share the memory of the process."""
    stats: Mapping[str, Any] = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    total = host_memory()
    return (total[0] if total else 2**33) // len(devices)
