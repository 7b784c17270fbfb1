"""The devices of a target that are not here, as JAX describes them: programs can be compiled for them, not run."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from meshpipe.accelerators import quiet_libtpu
from meshpipe.errors import ArgumentError
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.target_name import TargetName
from meshpipe.mesh import use_cpu_devices
from meshpipe.processes.stop import keeping_handlers

_EXTRAS = {"tpu": "tpu-target", "gpu": "gpu-target"}
_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")

_NVIDIA: Mapping[str, Any] = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 49152,
    "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535,
    "block_dim_limit_z": 65535,
    "thread_dim_limit_x": 1024,
    "thread_dim_limit_y": 1024,
    "thread_dim_limit_z": 64,
    "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536,
}
"""What all NVIDIA GPUs from V100 on have in common, in XLA's names."""
_CUDNN = {"major": 9, "minor": 8, "patch": 0}


def check_wheels(target: TargetName) -> None:
    """Raises `ArgumentError` when the packages that compile for the target are not installed; imports none of them."""
    platform = target.hardware.platform
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise _missing("libtpu", target)
    if platform == "gpu" and not any(importlib.util.find_spec(name) for name in _CUDA_PLUGINS):
        raise _missing("JAX's CUDA plugin", target)


def _missing(package: str, target: TargetName) -> ArgumentError:
    extra = _EXTRAS[target.hardware.platform]
    return ArgumentError(f"To compile for {target.text}, {package} must be installed: pip install 'meshpipe[{extra}]'")


def devices_of(target: TargetName) -> Sequence[jax.Device]:
    """The devices of a target in JAX's order. Of a CPU that a file describes, virtual devices of this process.

    Raises `ArgumentError` when the packages that compile for it are not installed, or do not know the devices.
    """
    check_wheels(target)
    hardware = target.hardware
    if hardware.platform == "cpu":
        use_cpu_devices(target.num_devices)
        return jax.devices("cpu")[: target.num_devices]
    if hardware.platform == "tpu":
        return _described(target, "tpu", _slice(target))
    hosts, each = target.shape
    # Partitions x hosts x devices: a partition is what one interconnect joins.
    joined = max(1, min(hosts, hardware.joined_devices // each))
    parts = f"{hosts // joined}x{joined}x{each}" if hosts % joined == 0 else f"1x{hosts}x{each}"
    return _described(target, "cuda", {"topology": parts, "target_config": target_config(hardware)})


def _slice(target: TargetName) -> Mapping[str, Any]:
    hardware = target.hardware
    if hardware.slices is None:
        raise ArgumentError(
            f"A described TPU must have the field slices, which says how its chips are joined. Got {hardware.name} "
            "without. Take it from a similar TPU in meshpipe/hardware/catalogue.json."
        )
    generation = hardware.compiler.get("topology_name", hardware.name)
    settings: dict[str, Any] = {"topology_name": f"{generation}:{'x'.join(map(str, target.shape))}"}
    chips = target.num_devices // hardware.slices.devices_per_chip
    if target.hosts == 1 and chips > 1:
        settings["chips_per_host_bounds"] = (*target.shape, 1)[:3]
    elif chips == 1:
        settings["chips_per_host_bounds"] = (1, 1, 1)
    if hardware.compiler.get("megacore"):
        settings["chip_config_name"] = "megacore"
    return settings


def _described(target: TargetName, platform: str, settings: Mapping[str, Any]) -> Sequence[jax.Device]:
    quiet_libtpu(gpu=True)
    from jax.experimental import topologies

    try:
        with keeping_handlers():
            return topologies.get_topology_desc(platform=platform, **settings).devices
    except Exception as error:  # of the plugin, which has no class of its own for what it does not know
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ArgumentError(
            f"The installed compiler must know the devices of {target.text}. It does not: {first}. "
            f"Update it: pip install --upgrade 'meshpipe[{_EXTRAS[target.hardware.platform]}]'"
        ) from error


def target_config(hardware: Hardware) -> str:
    """XLA's description of a GPU that is not there, as the text of a protocol buffer.

    The names are those of `xla/backends/gpu/target_config/specs` in the repository openxla/xla. Raises `ArgumentError`
    when the description lacks what XLA asks for.
    """
    own = dict(hardware.compiler)
    missing = [name for name in ("compute_capability", "core_count", "fpus_per_core") if name not in own]
    if missing:
        raise ArgumentError(
            f"A described GPU must have what XLA asks for, in its field compiler: {', '.join(missing)}, ... "
            f"Got {hardware.name} without. Take them from a similar GPU in meshpipe/hardware/catalogue.json."
        )
    major, minor = (int(part) for part in str(own.pop("compute_capability")).split("."))
    values = {
        **_NVIDIA,
        **own,
        "memory_bandwidth": round(hardware.memory_bandwidth),
        "device_memory_size": hardware.memory_bytes,
    }
    lines = [f"  {name}: {value}" for name, value in values.items()]
    lines.append(f"  cuda_compute_capability {{ major: {major} minor: {minor} }}")
    cudnn = " ".join(f"{name}: {value}" for name, value in _CUDNN.items())
    return "\n".join(
        (
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            f"dnn_version_info {{ {cudnn} }}",
            f'device_description_str: "{hardware.device_kind}"',
        )
    )
