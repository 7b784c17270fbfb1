"""`meshpipe plan --target`, for a CPU that a file describes: that needs no compiler but JAX's own."""

import json
from pathlib import Path

import pytest
import tiny_recipes

from meshpipe.cli.main import main

MACHINE = {
    "name": "slow",
    "platform": "cpu",
    "device_kind": "slow",
    "flops": {"float32": 1e9},
    "memory_bytes": 2**30,
    "memory_bandwidth": 1e9,
    "host_link": 1e9,
    "network_link": 1e9,
    "host_latency": 0,
    "network_latency": 0,
    "devices_per_host": 2,
    "efficiency": {"products": 1, "memory": 1, "links": 1, "network": 1},
}


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a recipe and a described machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "tiny.py").write_text(Path(tiny_recipes.__file__).read_text())
    (tmp_path / "slow.json").write_text(json.dumps(MACHINE))
    return tmp_path


def test_plan_for_a_machine_that_a_file_describes(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", "--target", "slow.json:2", "--plot", "a.png"]) == 0
    out = capsys.readouterr().out
    assert "It fits: rank" in out
    assert Path("a.png").stat().st_size > 1000


def test_a_plan_in_numbers(in_process: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", "--target", "slow.json:2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing_bytes"] == 0
    assert found["step_s"] > 0
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert {"forward", "backward", "update"} <= {program["name"] for program in found["programs"]}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--target gpu:h1000:8", "h1000"),
        ("--target gpu:h100:1", "must not have more devices than its target"),
        ("--target gpu:h100:8 --compare", "without --compare"),
        ("--json", "--json needs --target"),
        ("--target gpu:h100:8 --profile", "without --profile"),
        ("--target slow.json:2 --plot a.nothing", "suffix"),
    ],
)
def test_wrong_targets_of_plan(in_process: Path, flags: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny:pipeline", *flags.split()]) == 2
    assert says in capsys.readouterr().err
