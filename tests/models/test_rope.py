"""YaRN stretches wavelengths as transformers does."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from meshpipe.models.rope import RopeScaling
from meshpipe.weights.fields import Fields
from meshpipe.weights.rope_config import read_scaling, write_scaling

SCALINGS: dict[str, dict[str, Any]] = {
    "qwen": {"factor": 4.0, "original_max_position_embeddings": 32_768},
    "of the longest text": {"factor": 4.0},
    "between pairs": {"factor": 8.0, "original_max_position_embeddings": 4096, "truncate": False, "beta_fast": 16.0},
    "a factor of its own": {"factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 0.7},
    "deepseek": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.2, "mscale_all_dim": 0.707},
}
THETA, HEAD = 10_000.0, 64


def read(name: str) -> RopeScaling:
    values = {"rope_type": "yarn", **SCALINGS[name]}
    config = Fields({"max_position_embeddings": 2048}, "config.json")
    return read_scaling(Fields(values, "rope_scaling of config.json"), config)


@pytest.mark.parametrize("name", SCALINGS)
def test_it_is_written_as_it_was_read(name: str) -> None:
    scaling = read(name)
    written = write_scaling(scaling)
    assert written is not None
    assert read_scaling(Fields(written, "rope_scaling"), Fields({}, "config.json")) == scaling


def test_short_wavelengths_stay_and_long_ones_are_stretched() -> None:
    frequencies = THETA ** (-jnp.arange(0, HEAD, 2) / HEAD)
    kept = RopeScaling(kind="yarn", factor=4.0, original_positions=32_768).scale(frequencies, THETA) / frequencies
    turns = 32_768 * np.asarray(frequencies) / (2 * np.pi)
    np.testing.assert_allclose(kept[turns > 64], 1.0)
    np.testing.assert_allclose(kept[turns < 0.5], 0.25)
    assert np.all(np.diff(np.asarray(kept)) <= 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALINGS)
def test_transformers_computes_the_same(name: str) -> None:
    hf = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "yarn", "rope_theta": THETA, **SCALINGS[name]}
    config = hf.Qwen3Config(head_dim=HEAD, max_position_embeddings=2048, rope_parameters=parameters)
    expected, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    scaling = read(name)
    frequencies = THETA ** (-jnp.arange(0, HEAD, 2, dtype=jnp.float32) / HEAD)
    np.testing.assert_allclose(scaling.scale(frequencies, THETA), expected.numpy(), rtol=2e-5)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-6)
