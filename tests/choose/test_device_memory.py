"""The script that compares an allocator's peak with predictions goes through its work where there is no accelerator."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = "--width 32 --heads 2 --length 16 --batch 8 --blocks 2 --microbatches 4 --dtype float32"
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
    "devices_per_host": 1,
    "efficiency": {"products": 1, "memory": 1, "links": 1, "network": 1},
}


def compare(folder: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], list[dict[str, object]]]:
    (folder / "slow.json").write_text(json.dumps(MACHINE))
    script = str(ROOT / "tests" / "benchmarks" / "device_memory.py")
    files = ("--json", str(folder / "found.json"), "--markdown", str(folder / "found.md"))
    command = [sys.executable, script, "--target", f"{folder}/slow.json:1", *SMALL.split(), *files, *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    return ended, json.loads((folder / "found.json").read_text())["rows"]


@pytest.mark.slow
def test_where_no_allocator_tells_both_predictions_are_equal_and_in_the_table(tmp_path: Path) -> None:
    ended, rows = compare(tmp_path, "--layouts", "0", "8")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "No allocator says" in ended.stdout
    assert [row["schedule"] for row in rows] == ["1f1b", "zb-h1"]
    for row in rows:
        assert row["measured"] is None
        assert row["predicted from what ran"] == row["predicted for target"]
    lines = (tmp_path / "found.md").read_text().splitlines()
    assert lines[-2].startswith("| `1f1b`, 1 stage | - | ")


@pytest.mark.slow
def test_a_layout_that_fails_is_a_row_with_the_reason_and_the_others_go_on(tmp_path: Path) -> None:
    ended, rows = compare(tmp_path, "--layouts", "0", "1", "--microbatches", "3")
    assert ended.returncode == 1
    assert len(rows) == 2
    for row in rows:
        assert "run: " in str(row["failed"])
        assert "predict: " in str(row["failed"])
        assert "microbatch" in str(row["failed"])


@pytest.mark.slow
def test_no_layout_begins_without_time(tmp_path: Path) -> None:
    ended, rows = compare(tmp_path, "--layouts", "0", "--seconds", "0")
    assert ended.returncode == 1
    assert rows[0]["failed"] == "run: no time was left; predict: no time was left"
