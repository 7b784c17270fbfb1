"""`meshpipe plan --target`, for a CPU that a file describes: that needs no compiler but JAX's own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny_recipes

from meshpipe.cli.main import main

ROOT = Path(__file__).parents[2]

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
    assert jax.device_count() == 8  # before a command asks for fewer
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


def plan_for_tpu(*flags: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """The plan of a small language model for a TPU, of a user whose JAX has a cache of its own."""
    command = [sys.executable, "-m", "meshpipe", "plan", "language_model:debug", "--target", "tpu:v5e:2x2", *flags]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_a_second_plan_finds_its_programs_and_jax_says_nothing_of_its_own_cache(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    first, second = (plan_for_tpu("--json", cache=tmp_path / "cache") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    for ended in (first, second):
        assert "persistent" not in ended.stderr
        assert "Warning" not in ended.stderr
    assert json.loads(first.stdout) == json.loads(second.stdout)
    kept = list((tmp_path / "cache").rglob("*.program"))
    assert len(kept) > 5
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path not in kept]
    # What is known of the programs is in these files alone: without one, it is compiled again.
    written = {path: path.stat().st_mtime_ns for path in kept}
    kept[0].unlink()
    assert plan_for_tpu("--json", cache=tmp_path / "cache").returncode == 0
    changed = [path for path in kept if path.stat().st_mtime_ns != written[path]]
    assert changed == [kept[0]]


@pytest.mark.slow
def test_a_rank_whose_programs_the_compiler_refuses_does_not_fit_by_so_much(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    flags = ("--batch-size", "524288", "--num-microbatches", "4")
    ended = plan_for_tpu(*flags, cache=tmp_path / "cache")
    assert ended.returncode == 0, ended.stderr
    assert "forward_backward (refused)" in ended.stdout
    assert "more than there are" in ended.stdout
    assert "so times are not predicted" in ended.stdout
    found = json.loads(plan_for_tpu("--json", *flags, cache=tmp_path / "cache").stdout)
    assert found["missing_bytes"] > 0
    assert found["step_s"] is None
    assert any(program["name"] == "update" and not program["is_refused"] for program in found["programs"])
