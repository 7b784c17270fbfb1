"""The devices of this machine as a target, on which layouts are measured, not predicted."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace

import jax

from meshpipe.advise.advice import Confirmed
from meshpipe.advise.candidates import Space
from meshpipe.advise.cases import cases_of
from meshpipe.advise.confirm import confirm_best
from meshpipe.advise.estimate import Estimate, Estimator
from meshpipe.advise.measure_layers import measure_layers
from meshpipe.choose.counted import CORE
from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.hardware.catalogue import hardware_of
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.target_name import HERE, TargetName
from meshpipe.machine import free_memory, usable_cores
from meshpipe.observe.machine_rates import measure_machine
from meshpipe.runs.build import make_trainer

STEPS = 5
"""Steps of a layout that are timed, after a first one."""
MOST_PER_CORE = 4
"""Virtual devices that are measured for each core of this machine."""
CPU_BANDWIDTH = 1e10
"""Bytes per second that virtual devices share, roughly: layouts are measured, so this only chooses which."""


def count_here(text: str) -> int | None:
    """The number of devices in `here:4`; None where `here` gives none. Raises `ArgumentError` for other texts."""
    match = re.fullmatch(rf"{HERE}(?::([1-9]\d{{0,3}}))?", text)
    if match is None:
        raise ArgumentError(f"`target` here takes a number of devices, such as here:4. Got {text!r}.")
    return int(match[1]) if match[1] else None


def most_cpu_devices() -> int:
    """How many virtual devices are measured at most: more would show how cores are shared out, and take very long."""
    return max(1, int(MOST_PER_CORE * usable_cores()))


def check_cpu_devices(count: int) -> None:
    """Raises `ArgumentError` for more virtual devices than `most_cpu_devices`."""
    most, cores = most_cpu_devices(), usable_cores()
    if count > most:
        raise ArgumentError(
            f"`target` here runs layouts, with at most {MOST_PER_CORE} virtual devices for each core. Got {count:,} "
            f"devices on {cores:g} {'core' if cores == 1 else 'cores'}. Write here:{most}, or have layouts estimated: "
            f"describe a machine in a file, and pass machine.json:{count}."
        )


def target_here(devices: Sequence[jax.Device]) -> TargetName:
    """These devices of this machine. Raises `ArgumentError` for accelerators that are not known."""
    device, count = devices[0], len(devices)
    hardware = _cores(count) if device.platform == "cpu" else hardware_of(device.device_kind)
    if hardware is None:
        raise ArgumentError(
            f"`target` here needs a device that is known. Got {device.device_kind}. Describe it in a file, and pass "
            f"machine.json:{count}."
        )
    return TargetName(text=HERE, hardware=hardware, shape=(1, count), num_devices=count, hosts=1)


def _cores(count: int) -> Hardware:
    """Virtual CPU devices, which share the cores and the memory of the machine."""
    return Hardware(
        name=HERE,
        platform="cpu",
        device_kind="cpu",
        flops={"float32": CORE * usable_cores() / count},
        memory_bytes=int((free_memory() or 2**33) / count),
        memory_bandwidth=CPU_BANDWIDTH / count,
        host_link=CPU_BANDWIDTH / count,
        network_link=CPU_BANDWIDTH / count,
        host_latency=1e-4,
        network_latency=1e-4,
        devices_per_host=count,
        joined_devices=count,
        efficiency={"products": 1.0, "memory": 1.0, "links": 1.0, "network": 1.0},
        alone=float(count),  # XLA runs one device's products on all cores
    )


def measured_machine(known: Hardware, devices: Sequence[jax.Device]) -> Hardware:
    """The machine with the rates of these devices: virtual devices are measured, accelerators are known."""
    if known.platform != "cpu":
        return known
    return replace(Hardware.of(measure_machine(HERE, devices)), memory_bytes=known.memory_bytes)


def with_measured_layers(
    estimator: Estimator, config: Config, devices: Sequence[jax.Device], space: Space
) -> Estimator:
    """The same with times of layers that are measured on these devices now; itself where they do not fit, or would take
    too long.
    """
    cases = cases_of(space.layouts(), estimator)
    if not cases.cases:
        return estimator
    times = measure_layers(config, devices, cases)
    return Estimator(estimator.work, times, estimator.hardware, estimator.batch_size, estimator.limit)


def measure_best(choices: Sequence[Sequence[Estimate]], config: Config) -> list[Confirmed]:
    """The fastest of a few steps of each layout that can win, which is compiled and run on JAX's devices."""
    return confirm_best("Measuring the best,", choices, lambda estimate: _measured(estimate, config))


def _measured(estimate: Estimate, config: Config) -> Confirmed:
    laid_out = estimate.layout.configure(config)
    try:
        batch = laid_out.task().batch
        trainer = make_trainer(laid_out)
        taken = []
        for _ in range(1 + STEPS):
            began = time.perf_counter()
            jax.block_until_ready(trainer.step(batch).loss)
            taken.append(time.perf_counter() - began)
    except ValueError as error:
        return Confirmed(estimate=estimate, how="measured", reason=str(error))
    # What else runs on the machine only adds to it.
    return Confirmed(estimate=replace(estimate, seconds=min(taken[1:])), how="measured")
