"""The devices of this machine are measured, and their description is a target."""

import json
from pathlib import Path

import jax
import pytest

from meshpipe.cli.main import main
from meshpipe.compiler.topology import devices_of
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.target_name import parse_target
from meshpipe.observe import machine_rates


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "_MOST", 3)
    jax.devices()  # with the devices of all tests: the command would start JAX with its own


def test_measured_devices_are_a_target_by_the_name_of_their_file(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.json"
    assert main(["plan", "--measure-machine", str(file), "--devices", "2"]) == 0
    assert f"use it with --target {file}:2." in capsys.readouterr().out.replace("\n", "")
    target = parse_target(f"{file}:2")
    assert target.hardware.platform == "cpu"
    assert target.hardware.devices_per_host == 2
    assert devices_of(target) == jax.devices()[:2]
    assert 1e8 < target.hardware.flops["float32"] < 1e13
    assert 1e7 < target.hardware.memory_bandwidth < 1e13
    assert 0 < target.hardware.host_latency < 1
    assert "assumed" in " ".join(json.loads(file.read_text())["sources"])


def test_one_device_says_that_it_has_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "_products", lambda mesh, dtype: 1e12)
    found = machine_rates.measure_machine("mine", jax.devices()[:1])
    assert Hardware.of(found).joined_devices == 1
    assert machine_rates._ALONE in found["sources"]


def test_a_known_device_is_compared_with_its_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_rates, "_products", lambda mesh, dtype: {"bfloat16": 700e12, "float32": 400e12}[dtype])
    monkeypatch.setattr(machine_rates, "hardware_of", lambda kind: parse_target("gpu:h100:8").hardware)
    hardware = Hardware.of({**machine_rates.measure_machine("mine", jax.devices()[:2]), "platform": "gpu"})
    assert hardware.rate("bfloat16") == 989.4e12
    assert hardware.efficiency["products"] == pytest.approx(700 / 989.4)
    assert hardware.compiler["core_count"] == 132
    assert hardware.network_link == 50e9


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["text_classifier:single", "--measure-machine", "x.json"], "it takes no recipe"),
        (["--measure-machine", "x.txt"], "must name a file that ends in .json"),
        (["--measure-machine", "/nowhere/x.json"], "there is no folder /nowhere"),
        (["--measure-machine", "x.json", "--devices", "0"], "at least 1"),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_measured(arguments: list[str], says: str, capsys) -> None:
    assert main(["plan", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.replace("│", "").split())
