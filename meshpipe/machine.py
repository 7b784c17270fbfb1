"""What this process may use of the machine: cores and memory, within the limits of its container."""

import os
from pathlib import Path


def usable_cores(root: Path = Path("/")) -> float:
    """Processor cores that the process may use, by its affinity and the quota of its control group."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = _read(root / "sys/fs/cgroup/cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, int(quota) / int(period))
    return cores


def host_memory(root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes of memory that the process may use at most, and that are free now; None where that cannot be read."""
    lines = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    if not {"MemTotal", "MemAvailable"} <= lines.keys():
        return None
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = (_read(root / "sys/fs/cgroup" / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        total, free = min(total, int(limit)), min(free, max(0, int(limit) - int(used)))
    return total, free


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
