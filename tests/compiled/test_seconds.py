"""The time of a program on a described machine: the roofline, and its collectives over links."""

from dataclasses import replace

import pytest

from meshpipe.compiled.collectives import Collective
from meshpipe.compiled.program import CompiledProgram
from meshpipe.compiled.seconds import group_of, plan_seconds
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.links import Group, collective_seconds

MACHINE = Hardware(
    name="made-up",
    platform="gpu",
    device_kind="Made up",
    flops={"bfloat16": 100e12, "float32": 50e12},
    memory_bytes=10**10,
    memory_bandwidth=1e12,
    host_link=100e9,
    network_link=10e9,
    host_latency=1e-6,
    network_latency=1e-5,
    devices_per_host=4,
    joined_devices=4,
    efficiency={"products": 0.5, "memory": 0.8, "links": 0.8, "network": 0.5},
)
PROGRAM = CompiledProgram(
    stage=0,
    name="forward",
    arguments=0,
    outputs=0,
    temporaries=0,
    aliased=0,
    code=0,
    products={"bfloat16": 1e12, "float32": 1e12},
    bytes_accessed=0.0,
    optimal_seconds=None,
    collectives=(),
)


def test_a_program_takes_as_long_as_products_or_memory() -> None:
    # 1e12 / 100e12 + 1e12 / 50e12 at half the peak; 1e11 bytes at 0.8e12 a second.
    assert plan_seconds(PROGRAM, MACHINE, {"data": 1, "tensor": 1}) == pytest.approx(0.06)
    slow = replace(PROGRAM, bytes_accessed=1e11)
    assert plan_seconds(slow, MACHINE, {"data": 1, "tensor": 1}) == pytest.approx(0.125)


def test_collectives_come_on_top_each_with_its_latency() -> None:
    mesh = {"data": 2, "tensor": 2}
    two = Collective(kind="all-reduce", count=2, bytes=2 * 10**9, axes=("tensor",))
    assert plan_seconds(replace(PROGRAM, collectives=(two,)), MACHINE, mesh) == pytest.approx(
        0.06 + 2 * collective_seconds("all-reduce", 1e9, Group(2, 1), MACHINE)
    )


def test_the_devices_of_a_collective_by_its_axes() -> None:
    mesh = {"data": 4, "tensor": 2}
    assert group_of(["tensor"], mesh) == Group(2, 1)
    assert group_of(["data"], mesh) == Group(4, 2)
    assert group_of(["data", "tensor"], mesh) == Group(8, 1)
    assert group_of([], mesh) == Group(8, 1)  # not known
    assert group_of(["tensor"], {"data": 4, "tensor": 1}) == Group(1, 1)
