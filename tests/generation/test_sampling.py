"""Tokens are drawn as temperature, top-k, top-p and seed say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from meshpipe.generation.config import SamplingConfig
from meshpipe.generation.sampling import sample

LOGITS = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))
DRAWS = 4000


def draw(**fields: Any) -> np.ndarray:
    """The share of each token among draws at different positions."""
    given: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3, "request": 0} | fields
    dtypes = {"temperature": jnp.float32, "top_k": jnp.int32, "top_p": jnp.float32}
    logits = jnp.tile(given.pop("logits", LOGITS), (DRAWS, 1))
    rows = {name: jnp.full(DRAWS, value, dtypes.get(name, jnp.uint32)) for name, value in given.items()}
    tokens = jax.jit(sample)(logits, jnp.arange(DRAWS, dtype=jnp.int32), **rows)
    return np.bincount(tokens, minlength=LOGITS.size) / DRAWS


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, np.square([0.4, 0.3, 0.15, 0.1, 0.05]) / 0.285),
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"top_p": 0.75}, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"temperature": 1e-38, "logits": LOGITS + 5}, [1, 0, 0, 0, 0]),  # infinite when they are divided by it
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0, 0]),  # of two, the first has 4 / 7
    ],
)
def test_shares_of_tokens(fields: dict[str, Any], expected: list[float]) -> None:
    expected = np.asarray(expected)
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(draw(**fields) - expected) <= 4 * deviation).all()


def test_rows_have_settings_of_their_own_and_draws_follow_from_seed_request_and_position() -> None:
    logits = jnp.tile(LOGITS, (200, 1))
    positions = jnp.arange(200, dtype=jnp.int32) // 2
    rows: dict[str, Any] = {
        "temperature": jnp.tile(jnp.array([0.0, 1.0], jnp.float32), 100),
        "top_k": jnp.zeros(200, jnp.int32),
        "top_p": jnp.ones(200, jnp.float32),
        "seed": jnp.full(200, 7, jnp.uint32),
        "request": jnp.full(200, 5, jnp.uint32),
    }
    drawn = jax.jit(sample)
    tokens = np.asarray(drawn(logits, positions, **rows))
    assert not tokens[::2].any()
    order = np.random.default_rng(0).permutation(200)
    shuffled = {name: value[order] for name, value in rows.items()}
    np.testing.assert_array_equal(drawn(logits[order], positions[order], **shuffled), tokens[order])
    for name in ("seed", "request"):
        other = np.asarray(drawn(logits, positions, **{**rows, name: rows[name] + 1}))
        assert (other[1::2] != tokens[1::2]).any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "`max_tokens` must be at least 1"),
        ({"temperature": -1.0}, "`temperature` must be a finite number of at least 0"),
        ({"temperature": float("nan")}, "`temperature` must be a finite number of at least 0"),
        ({"top_k": -1}, "`top_k` must be at least 0"),
        ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1"),
        ({"top_p": 1.5}, "`top_p` must be above 0 and at most 1"),
        ({"seed": 2**32}, "`seed` must be at least 0 and below"),
        ({"stop_tokens": (-1,)}, "`stop_tokens` must be at least 0"),
        ({"stop_tokens": (True,)}, "`stop_tokens` must be a whole number"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**fields)
