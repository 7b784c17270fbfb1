"""What a run finds: the versions of packages, and settings of JAX that do not suit it."""

import importlib.metadata
import platform

import jax

PACKAGES = ("meshpipe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

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


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide the numbers of a run."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_settings() -> None:
    """Raises `ValueError` for settings of JAX with which nothing can be trained, before they fail somewhere inside."""
    for name, values in _UNFIT.items():
        value = getattr(jax.config, name, None)
        if value in values:
            raise ValueError(
                "A trainer compiles its programs ahead of time and moves values between devices. "
                f"Got the setting {name}={value}, under which that fails. Unset it, or debug a layer with it by itself."
            )
