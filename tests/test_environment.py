"""JAX settings that make training impossible, and packages that do not suit, are refused with a clear message."""

import importlib.metadata
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import jax
import pytest
import tiny_recipes

from meshpipe.environment import check_settings, unfit_libtpu
from meshpipe.observe.config import ObserveConfig
from meshpipe.runs.profile_window import check_profile


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("jax_disable_jit=True", jax.disable_jit()),
        ("jax_transfer_guard.*=disallow", jax.transfer_guard("disallow")),
        ("jax_transfer_guard_host_to_device=disallow", jax.transfer_guard_host_to_device("disallow")),
        ("jax_numpy_dtype_promotion=strict", jax.numpy_dtype_promotion("strict")),
        ("jax_check_tracer_leaks=True", jax.checking_leaks()),
    ],
)
def test_unsuitable_settings_are_refused(name: str, setting: AbstractContextManager) -> None:
    with setting, pytest.raises(ValueError, match=f"Got the setting {name}, which prevents that. Unset it"):
        check_settings()


def test_other_settings_stay() -> None:
    with jax.debug_nans(True), jax.transfer_guard("log"), jax.enable_x64(True):
        check_settings()


def test_a_libtpu_of_another_jax_is_refused_before_the_profiler_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = next(line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu"))
    wanted = pinned.removeprefix("libtpu==").split(".*")[0]
    for version, is_fit in ((f"{wanted}.7", True), (f"{wanted}7.1", False), ("9.9", False)):
        folder = tmp_path / version
        (folder / f"libtpu-{version}.dist-info").mkdir(parents=True)
        (folder / f"libtpu-{version}.dist-info" / "METADATA").write_text(f"Name: libtpu\nVersion: {version}\n")
        others = [dist for dist in importlib.metadata.distributions() if dist.name != "libtpu"]
        found = [*others, *importlib.metadata.distributions(name="libtpu", path=[str(folder)])]
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "distributions", lambda found=found: found)
            assert (unfit_libtpu() is None) == is_fit, version
            if not is_fit:
                config = tiny_recipes.pipeline()
                observe = ObserveConfig(profile_steps="1:2", profile_dir=str(tmp_path))
                with pytest.raises(ValueError, match=f"Got libtpu {version}. Install jax"):
                    check_profile(replace(config, observe=observe))
