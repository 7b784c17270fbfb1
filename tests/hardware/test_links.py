"""Seconds of collectives on described links."""

from dataclasses import replace

import pytest

from meshpipe.hardware.catalogue import find_hardware
from meshpipe.hardware.links import Group, bandwidth, collective_seconds, move_seconds

H100 = replace(
    find_hardware("h100"),
    host_latency=0.0,
    network_latency=0.0,
    host_link=400e9,
    network_link=50e9,
    efficiency={"products": 1.0, "memory": 1.0, "links": 1.0, "network": 1.0},
)


def test_inside_a_host_a_ring_moves_an_array_twice():
    assert collective_seconds("all-reduce", 8e9, Group(8), H100) == pytest.approx(2 * 7 / 8 * 8e9 / 400e9)
    assert collective_seconds("all-gather", 8e9, Group(8), H100) == pytest.approx(7 / 8 * 8e9 / 400e9)
    assert collective_seconds("all-reduce", 8e9, Group(1), H100) == 0


@pytest.mark.parametrize(
    ("group", "rate"),
    [
        (Group(8), 400e9),  # one host
        (Group(16), 400e9),  # two: eight links of 50 GB/s between them
        (Group(8, stride=4), 100e9),  # two devices of each host
        (Group(8, stride=8), 50e9),  # one device of each host
    ],
)
def test_devices_of_a_host_share_the_way_to_the_next(group: Group, rate: float):
    assert bandwidth(group, H100) == rate


def test_a_transfer_takes_the_link_that_its_distance_needs():
    assert move_seconds(4e9, 4, H100) == pytest.approx(0.01)
    assert move_seconds(4e9, 8, H100) == pytest.approx(0.08)
    assert move_seconds(0.0, 8, H100) == 0


def test_in_a_torus_a_neighbour_has_one_link_and_an_axis_two():
    v5p = find_hardware("v5p")
    assert bandwidth(Group(4), v5p) == pytest.approx(v5p.host_link * v5p.efficiency["links"] * 2 / v5p.links)
