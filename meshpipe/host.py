"""The process as a whole: memory that the C library keeps, garbage collection put off, and versions of packages."""

import ctypes
import gc
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from meshpipe.mesh import on_cpu

PACKAGES = ("meshpipe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),  # bytes free at the end of a heap before it shrinks
    "MALLOC_TOP_PAD_": (-2, 64 * 2**20),  # bytes by which a heap grows or stays larger than needed: a whole heap
    "MALLOC_MMAP_MAX_": (-4, 0),  # arrays with a mapping of their own, unmapped when they are freed
}
"""By variable of the environment: the number that `mallopt` has for it, and the value."""


def keep_freed_memory(mesh: Mesh) -> None:
    """Has the C library keep memory that is freed, if the mesh is of CPU devices; it has an effect with glibc alone.

    XLA takes memory for every result of every program. The C library gives large pieces back to the operating system
    as soon as they are free, which then has to find, clear and map the same pages over again for each microbatch.
    Environment variables that set the same (see `man mallopt`) take precedence.
    """
    if not on_cpu(mesh):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return
    for variable, (number, value) in _SETTINGS.items():
        if variable not in os.environ:
            mallopt(number, value)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For work that makes many objects and hardly any garbage: collections would walk them again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide the numbers of a run."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


_UNFIT = {
    "jax_disable_jit": (True,),
    "jax_check_tracer_leaks": (True,),
    "jax_numpy_dtype_promotion": ("strict",),
    **{
        f"jax_transfer_guard{direction}": ("disallow", "disallow_explicit")
        for direction in ("", "_host_to_device", "_device_to_device", "_device_to_host")
    },
}
"""Settings of JAX under which programs cannot be compiled ahead of time, or Optax and transfers between stages fail."""


def check_settings() -> None:
    """Raises `ValueError` for settings of JAX with which nothing can be trained, before they fail somewhere inside."""
    for name, values in _UNFIT.items():
        value = getattr(jax.config, name, None)
        if value in values:
            raise ValueError(
                "A trainer compiles its programs ahead of time and moves values between devices. "
                f"Got the setting {name}={value}, under which that fails. Unset it, or debug a layer with it by itself."
            )
