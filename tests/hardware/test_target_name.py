"""Which targets exist, and what is said of those that do not."""

import json
from pathlib import Path

import pytest

from meshpipe.errors import ArgumentError
from meshpipe.hardware.target_name import parse_target


@pytest.mark.parametrize(
    ("text", "devices", "hosts"),
    [
        ("tpu:v5p:4x4x4", 64, 16),
        ("tpu:v5p:8x8x12", 768, 192),
        ("tpu:v5e:2x4", 8, 1),
        ("tpu:v6e:16x16", 256, 64),
        ("tpu:v4:2x2x2", 8, 2),
        ("tpu:tpu7x:2x2x2", 16, 2),
        ("tpu:v5p:1x1x1", 1, 1),
        ("gpu:h100:8", 8, 1),
        ("gpu:h100:1", 1, 1),
        ("gpu:h100:4x8", 32, 4),
        ("gpu:gb200:18x4", 72, 18),
    ],
)
def test_a_target_names_devices_and_hosts(text: str, devices: int, hosts: int) -> None:
    target = parse_target(text)
    assert (target.num_devices, target.hosts) == (devices, hosts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gpu:h10:8", "Did you mean h100"),
        ("tpu:v5pp:2x2x1", "Did you mean v5p"),
        ("tpu:h100:8", "Write gpu:h100:8"),
        ("h100:8", "Write gpu:h100:8"),
        ("gpu:h100:16", "Write for example gpu:h100:2x8"),
        ("gpu:h100:2x16", "Write for example gpu:h100:4x8"),
        ("gpu:h100:1x1x8", "a host of h100 has at most 8"),
        ("gpu:h100:0", "must end in a size"),
        ("gpu:h100", "how many devices"),
        ("tpu:v5p:3x3x3", "Write for example tpu:v5p:2x4x4"),
        ("tpu:v5p:4x4", "Write for example tpu:v5p:2x2x4"),
        ("tpu:v5e:4x4x4", "Write for example tpu:v5e:8x8"),
        ("tpu:v5p:64x64x64", "The largest has 6,144 chips: tpu:v5p:16x16x24"),
        ("tpu:v5p:four", "must end in a size"),
        ("", "how many devices"),
        ("abacus:8", "must be one of"),
        ("tpu:v5e:3x3", "Write for example tpu:v5e:4x4"),
        ("tpu:v5e:8", "Write for example tpu:v5e:2x4"),
        ("tpu:v5e:16x32", "The largest has 256 chips: tpu:v5e:16x16"),
        ("v5litepod-8", "counts chips. Write for example tpu:v5e:2x4"),
        ("tpu:V5P-128", "counts cores, two of a chip. Write for example tpu:v5p:4x4x4"),
        ("v4-8", "Write for example tpu:v4:2x2x1"),
        ("v6e-100000", "The largest has 256 chips: tpu:v6e:16x16"),
    ],
)
def test_a_target_that_does_not_exist_is_refused_with_the_way_out(text: str, says: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_target(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "kind", "devices"),
    [
        ("TPU:V6E:2X2", "TPU v6 lite", 4),
        ("GPU:H100:4x8", "NVIDIA H100", 32),
        ("tpu:v5litepod:2x4", "TPU v5 lite", 8),
        ("tpu:trillium:16x16", "TPU v6 lite", 256),
        ("tpu:ironwood:2x2x1", "TPU7x", 8),
    ],
)
def test_other_spellings_name_the_same_devices(text: str, kind: str, devices: int) -> None:
    target = parse_target(text)
    assert (target.hardware.device_kind, target.num_devices) == (kind, devices)


def test_a_mesh_must_fit_its_target() -> None:
    parse_target("gpu:h100:8").check_size(8)
    with pytest.raises(ArgumentError, match="Got a mesh of 16, with 8 in gpu:h100:8"):
        parse_target("gpu:h100:8").check_size(16)


def test_a_file_is_a_target_with_a_size(tmp_path: Path) -> None:
    catalogue = json.loads((Path(__file__).parents[2] / "meshpipe/hardware/catalogue.json").read_text())
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(next(entry for entry in catalogue if entry["name"] == "h100") | {"name": "mine"}))
    assert parse_target(f"{file}:2x8").num_devices == 16
    with pytest.raises(ArgumentError, match="how many devices"):
        parse_target(str(file))
