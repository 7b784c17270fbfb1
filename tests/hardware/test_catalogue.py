"""The described machines, and files that describe further ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from meshpipe.errors import ArgumentError
from meshpipe.hardware.catalogue import find_hardware, hardware_of, known_hardware, read_hardware

CATALOGUE = Path(__file__).parents[2] / "meshpipe/hardware/catalogue.json"


def test_every_machine_has_sources_and_rates_of_the_right_size() -> None:
    for hardware in known_hardware().values():
        assert hardware.sources, hardware.name
        assert all(1e12 < rate < 1e16 for rate in hardware.flops.values()), hardware.name
        assert 2**33 <= hardware.memory_bytes < 2**38, hardware.name
        assert 1e11 < hardware.memory_bandwidth < 1e13, hardware.name
        assert hardware.network_link <= hardware.host_link < hardware.memory_bandwidth, hardware.name
        assert hardware.joined_devices >= hardware.devices_per_host, hardware.name
        assert (hardware.slices is not None) == (hardware.platform == "tpu"), hardware.name
        assert hardware.platform == "tpu" or "compute_capability" in hardware.compiler, hardware.name


def test_a_collective_over_one_axis_uses_two_links_of_a_torus_and_the_whole_of_a_switch() -> None:
    assert find_hardware("v5p").axis_link == 200e9
    assert find_hardware("v5p").neighbour_link == 100e9
    assert find_hardware("h100").axis_link == find_hardware("h100").neighbour_link == 450e9


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6e", "v6e"),
        ("TPU7x", "tpu7x"),
    ],
)
def test_a_machine_is_found_by_what_jax_calls_its_devices(kind: str, name: str) -> None:
    hardware = hardware_of(kind)
    assert hardware is not None
    assert hardware.name == name


def test_of_other_devices_nothing_is_known() -> None:
    assert hardware_of("cpu") is None


def of_catalogue(name: str) -> dict[str, Any]:
    return next(entry for entry in json.loads(CATALOGUE.read_text()) if entry["name"] == name)


def test_a_file_of_the_same_form_describes_a_further_machine(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(of_catalogue("h100") | {"name": "mine", "memory_bytes": 10**9}))
    hardware = find_hardware(str(file))
    assert (hardware.name, hardware.memory_bytes) == ("mine", 10**9)
    assert hardware.rate("bfloat16") == 989.4e12
    assert hardware.rate("float64") == 67e12
    assert hardware.rate("int4") == 67e12  # a dtype without a rate: the slowest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memory_bytes": None}, "memory_bytes must be a whole number of at least 1. Got None"),
        ({"flops": {}}, "flops must give FLOP/s by dtype"),
        ({"flops": {"bfloat16": "fast"}}, "flops of bfloat16 must be a number above 0. Got 'fast'"),
        ({"efficiency": {"products": 2}}, "efficiency of products must be above 0 and at most 1. Got 2"),
        ({"platform": "abacus"}, "platform must be one of tpu, gpu, cpu. Got 'abacus'"),
        ({"colour": "green"}, "has unknown colour"),
        ({"host_latency": -1}, "host_latency must be a number of seconds"),
        ({"sources": "me"}, "sources must be a list of texts"),
        ({"compiler": {"topology_name": "8 } x {"}}, "compiler must have words and numbers"),
        ({"compiler": {"core_count": "8 } x {"}}, "core_count of compiler must be a number above 0"),
        ({"compiler": {"core_count": 0}}, "core_count of compiler must be a number above 0"),
        ({"compiler": {"core_count": 1.5}}, "core_count of compiler must be a whole number"),
        ({"compiler": {"l2_cache_size": 10**30}}, "l2_cache_size of compiler must be a number above 0"),
        ({"memory_bytes": 10**30}, "memory_bytes must be below 2^62"),
        ({"compiler": {"compute_capability": 9}}, "compute_capability must be a text such as"),
        ({"slices": {"dims": 2, "shapes": ["2x2"], "most": 4}}, "slices are those of a TPU"),
        ({"platform": "tpu", "slices": {"dims": 2, "shapes": ["2x2x2"], "most": 4}}, "each of 2 dims. Got '2x2x2'"),
        ({"platform": "tpu", "slices": {"dims": "2"}}, "slices must have dims, shapes and most"),
    ],
)
def test_a_file_with_a_wrong_value_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(of_catalogue("h100") | change))
    with pytest.raises(ArgumentError, match="is not a valid description of a machine") as caught:
        read_hardware(file)
    assert says in str(caught.value)


def test_a_file_that_lacks_values_or_is_no_json_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"name": "mine"}')
    with pytest.raises(ArgumentError, match="lacks platform, device_kind, flops"):
        read_hardware(file)
    file.write_text("name: mine")
    with pytest.raises(
        ArgumentError, match=r"must be a JSON file.*meshpipe plan --measure-machine FILE.json` writes such"
    ):
        read_hardware(file)
    for text in ('{"name": "a", "name": "b"}', "[" * 10**5):
        file.write_text(text)
        with pytest.raises(ArgumentError, match="must be a JSON file"):
            read_hardware(file)
    file.write_text("3")
    with pytest.raises(ArgumentError, match=r"one machine\. Got int"):
        read_hardware(file)
    with pytest.raises(ArgumentError, match="No such file"):
        read_hardware(tmp_path / "none.json")
