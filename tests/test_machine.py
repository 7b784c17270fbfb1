"""Cores and memory are those that the process may use, also in a container."""

from pathlib import Path

from meshpipe.machine import host_memory, usable_cores

MEMORY = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


def make(root: Path, **files: str) -> Path:
    (root / "proc").mkdir()
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "proc/meminfo").write_text(MEMORY)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name.replace("_", ".")).write_text(text)
    return root


def test_without_limits(tmp_path: Path) -> None:
    root = make(tmp_path, memory_max="max\n", cpu_max="max 100000\n")
    assert host_memory(root) == (16_000_000 * 1024, 8_000_000 * 1024)
    assert usable_cores(root) == usable_cores(tmp_path / "nowhere") >= 1


def test_limits_of_a_container(tmp_path: Path) -> None:
    root = make(tmp_path, memory_max="4000000000\n", memory_current="1000000000\n", cpu_max="50000 100000\n")
    assert host_memory(root) == (4_000_000_000, 3_000_000_000)
    assert usable_cores(root) == 0.5


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None


def test_this_machine() -> None:
    memory = host_memory()
    assert memory is None or memory[0] >= memory[1] > 0
