"""JAX settings that make training impossible are refused with a clear message."""

from contextlib import AbstractContextManager

import jax
import pytest

from meshpipe.environment import check_settings


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
