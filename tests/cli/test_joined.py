"""What the commands that may have several processes have in common."""

import jax
import jax.numpy as jnp
import pytest

from meshpipe.cli.endings import explanation
from meshpipe.cli.joined import advising_on_memory
from meshpipe.errors import is_for_the_user


def test_the_error_of_a_device_that_has_too_little_memory_gets_the_way_out() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError) as found, advising_on_memory():
        jnp.zeros(1 << 46, jnp.uint8).block_until_ready()
    assert is_for_the_user(found.value)  # so the command ends without a traceback
    assert "RESOURCE_EXHAUSTED" in explanation(found.value)
    assert explanation(found.value).endswith("or make the mesh larger (--mesh.pipeline, --mesh.tensor).")
