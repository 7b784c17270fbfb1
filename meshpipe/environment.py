"""The environment of a run: package versions, and unsuitable JAX settings."""

import importlib.metadata
import platform
import re

import jax

from meshpipe.version import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

OPTIONAL = ("tokenizers", "jinja2", "pyarrow", "tensorboardX", "wandb", "ipywidgets", "scikit-learn", "lm_eval")
"""Packages of extras: what uses them says so when they are missing."""

_PLUGIN = re.compile(r"jax[-_].+[-_](plugin|pjrt)|libtpu")

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
    own = {"python": platform.python_version(), "meshpipe": __version__}
    return own | {name: _version(name) for name in PACKAGES}


def optional() -> dict[str, str]:
    """Versions of the packages that extras install."""
    return {name: _version(name) for name in OPTIONAL}


def plugins() -> dict[str, str]:
    """Versions of the installed packages that give JAX its accelerators, by name."""
    found = {dist.name: dist.version for dist in importlib.metadata.distributions() if dist.name}
    return {name: found[name] for name in sorted(found) if _PLUGIN.fullmatch(name)}


def unfit_libtpu() -> str | None:
    """What is wrong with the release of libtpu that is installed, and the way out; None if `jax` was made for it."""
    pinned = (re.match(r"libtpu==([\d.]+)\.\*", line) for line in importlib.metadata.requires("jax") or ())
    wanted = next((match[1] for match in pinned if match), None)
    got = plugins().get("libtpu")
    if got is None or wanted is None or got == wanted or got.startswith(f"{wanted}."):
        return None
    jax_version = _version("jax")
    return (
        f"jax {jax_version} needs libtpu {wanted}.*. Got libtpu {got}. Install jax[tpu]=={jax_version}, which brings "
        "the right one, or uninstall libtpu."
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def unfit_settings() -> list[str]:
    """The JAX settings, as `name=value`, with which a trainer cannot work."""
    values = {name: getattr(jax.config, name, None) for name in _UNFIT}
    return [f"{name}={value}" for name, value in values.items() if value in _UNFIT[name]]


def check_settings() -> None:
    """Raises `ValueError` for JAX settings that make training impossible, before they cause an obscure error."""
    for setting in unfit_settings():
        raise ValueError(
            "A trainer compiles its programs ahead of time and moves values between devices. "
            f"Got the setting {setting}, which prevents that. Unset it, or use it to debug a layer alone."
        )
