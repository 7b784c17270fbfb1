"""Memory for what is read: where a disk can write to directly, and which a CPU device takes as its own."""

import mmap

import numpy as np

_ALIGNMENT = 64
"""Bytes to which memory must be aligned so that a CPU device takes it without a copy."""
_HUGE = 2 << 20
"""Bytes of a huge page: one of them takes the processor, and a disk that writes to it, less time than 512 pages."""


def aligned_bytes(size: int, *, zeros: bool = False) -> np.ndarray:
    """As many bytes, zeros or of any value; large ones begin with a huge page where the system has them."""
    if size < _HUGE:
        memory = (np.zeros if zeros else np.empty)(size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        return memory[start : start + size]
    # Where nothing was written there is no memory yet, so that what lies before the first huge page takes none.
    # It is of zeros in any case.
    mapping = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = np.frombuffer(mapping, np.uint8)
    start = -memory.ctypes.data % _HUGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapping.madvise(mmap.MADV_HUGEPAGE, start, size - size % _HUGE)
    return memory[start : start + size]
