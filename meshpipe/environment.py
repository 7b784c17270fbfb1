"""The environment of a run: package versions, and unsuitable JAX settings."""

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
"""JAX settings that prevent ahead-of-time compilation, or make Optax or transfers between stages fail."""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the results of a run."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def check_settings() -> None:
    """Raises `ValueError` for JAX settings that make training impossible, before they cause an obscure error."""
    for name, values in _UNFIT.items():
        value = getattr(jax.config, name, None)
        if value in values:
            raise ValueError(
                "A trainer compiles its programs ahead of time and moves values between devices. "
                f"Got the setting {name}={value}, which prevents that. Unset it, or use it to debug a layer alone."
            )
