"""Values made alike in two processes have equal digests; different code or values have different digests."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from meshpipe.compiler.digest import digest, digest_of_text

SCALE = 2.0


def scaled(x: Any) -> Any:
    return x * SCALE


def uses_scaled(x: Any) -> Any:
    return scaled(x) + 1


def make(factor: float) -> Any:
    return lambda x: x * factor


@dataclass(frozen=True)
class Model:
    width: int
    names: frozenset[str] = frozenset({"a", "b", "c"})

    def loss(self, x: Any) -> Any:
        return x - self.width


class Layer(nnx.Module):
    def __call__(self, x: Any) -> Any:
        return nnx.relu(x)


VALUES = [Model(2).loss, make(0.1), functools.partial(scaled, x=1), jax.jit(uses_scaled), Layer, {"a": {1, 2, "x"}}]


def test_another_process_with_another_hash_seed_finds_the_same() -> None:
    code = "import test_digest as t; print([t.digest(v) for v in t.VALUES])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([*sys.path, str(Path(__file__).parent)]), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert run.stdout.strip() == str([digest(value) for value in VALUES])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (make(0.1), make(0.2)),
        (Model(2).loss, Model(3).loss),
        (1, 1.0),
        (0.0, -0.0),
        ([1, [2]], [1, 2]),
        (np.zeros(2), np.zeros(2, np.float32)),
        (jnp.zeros(2), jnp.ones(2)),
        (functools.partial(scaled, x=1), functools.partial(scaled, x=2)),
        (lambda x: x + 1, lambda x: x + 2),
        (nnx.relu, nnx.gelu),
    ],
)
def test_different_computations_have_different_digests(one: Any, other: Any) -> None:
    assert digest(one) == digest(one)
    assert digest(one) != digest(other)


def test_the_globals_that_a_function_names_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(uses_scaled)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert digest(uses_scaled) != before


def test_code_of_any_depth_is_followed() -> None:
    function = make(0.1)
    for _ in range(3000):
        function = functools.partial(function)
        function = (lambda inner: lambda x: inner(x))(function)
    assert digest(function) == digest(function)


def test_addresses_in_a_printed_program_do_not_count() -> None:
    assert digest_of_text("f=<function g at 0x7f01>") == digest_of_text("f=<function g at 0x7f02>")
    assert digest_of_text("a") != digest_of_text("b")
