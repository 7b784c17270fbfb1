"""What this process may use of the machine: cores and memory, within the limits of its container."""

import os
from pathlib import Path

CACHED = ("active_file", "inactive_file")
"""Lines of a control group's `memory.stat`."""


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
        # What the group has cached of files counts as used, and is given up for anything else.
        cached = sum(int(size) for name, size in _table(root / "sys/fs/cgroup/memory.stat") if name in CACHED)
        total, free = min(total, int(limit)), min(free, max(0, int(limit) - int(used) + cached))
    return total, free


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still allocate, also by the limit on its address space (`ulimit -v`); None where that
    cannot be found out.
    """
    found = host_memory(root)
    free = [] if found is None else [found[1]]
    try:
        import resource  # not on Windows

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = _read(root / "proc/self/statm").split()
        if limit != resource.RLIM_INFINITY and pages:
            free.append(max(0, limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE")))
    except ImportError:
        pass
    return min(free, default=None)


def format_bytes(count: int | float) -> str:
    """Bytes to three significant digits, with a decimal unit: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def _table(file: Path) -> list[tuple[str, str]]:
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in _read(file).splitlines())]


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
