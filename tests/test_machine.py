"""Cores and memory are those that the process may use, also in a container."""

import subprocess
import sys
from pathlib import Path

from meshpipe.machine import format_bytes, free_memory, host_memory, usable_cores

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


def test_cached_files_of_a_container_are_free(tmp_path: Path) -> None:
    stat = "anon 100000000\nactive_file 300000000\ninactive_file 500000000\n"
    root = make(tmp_path, memory_max="4000000000\n", memory_current="1000000000\n", memory_stat=stat)
    assert host_memory(root) == (4_000_000_000, 3_800_000_000)


def test_a_limit_on_the_address_space_counts(tmp_path: Path) -> None:
    program = "from meshpipe.machine import free_memory; print(free_memory())"
    limit = 1 << 30
    command = ["sh", "-c", f'ulimit -v {limit // 1024}; exec "$@"', "sh", sys.executable, "-c", program]
    free = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0 < free < limit
    assert free_memory(make(tmp_path)) == 8_000_000 * 1024  # without one


def test_bytes_in_words() -> None:
    counts = (0, 999, 1500, 26_953_662_464, 2.5e15)
    assert [format_bytes(count) for count in counts] == ["0 B", "999 B", "1.5 kB", "27 GB", "2,500 TB"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None


def test_this_machine() -> None:
    memory = host_memory()
    assert memory is None or memory[0] >= memory[1] > 0
