"""What changes the whole process, memory that the C library keeps and garbage collection put off: commands ask for it,
and the library by itself does not.
"""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from meshpipe.mesh import on_cpu

_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),  # bytes free at the end of a heap before it shrinks
    "MALLOC_TOP_PAD_": (-2, 64 * 2**20),  # bytes by which a heap grows or stays larger than needed: a whole heap
    "MALLOC_MMAP_MAX_": (-4, 0),  # arrays with a mapping of their own, unmapped when they are freed
}
"""By variable of the environment: the number that `mallopt` has for it, and the value."""


def keep_freed_memory(mesh: Mesh | None = None) -> None:
    """Has the C library keep memory that is freed, if the mesh is of CPU devices, or JAX's default devices are where
    there is none; it has an effect with glibc alone, and for the whole process.

    XLA takes memory for every result of every program. The C library gives large pieces back to the operating system
    as soon as they are free, which then has to find, clear and map the same pages over again for each microbatch.
    Environment variables that set the same (see `man mallopt`) take precedence.
    """
    if not (jax.default_backend() == "cpu" if mesh is None else on_cpu(mesh)):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    for variable, (number, value) in _SETTINGS.items():
        if variable not in os.environ:
            mallopt(number, value)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For work that makes many objects and hardly any garbage, such as the construction of a trainer: collections would
    walk them again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
