"""Settings of the whole process: memory kept by the C library, and garbage collection. Only commands change them; the
library itself does not.
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
"""By environment variable: the parameter number for `mallopt`, and the value."""


def keep_freed_memory(mesh: Mesh | None = None) -> None:
    """Makes the C library keep freed memory, if the mesh (by default, JAX's default backend) uses CPU devices. It
    affects the whole process, and has an effect only with glibc.

    XLA allocates memory for every result of every program. By default the C library returns large blocks to the
    operating system as soon as they are freed, which then must find, clear and map the same pages again for each
    microbatch. Environment variables for the same settings (see `man mallopt`) take precedence.
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
    """Disables garbage collection while many objects and little garbage are created, as when a trainer is made;
    collections would scan the objects again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
