"""A layer whose forward, input gradient and weight gradient each take a fixed time without using a core.

So a machine with two cores shows the timeline that many devices would have.
"""

import ctypes
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

SOURCE = Path(__file__).with_suffix(".cc")
TARGET = "meshpipe_benchmark_sleep"
WIDTH = 64


def register() -> None:
    """Builds the XLA custom call with g++ and makes it known to JAX."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "sleeping_layer.so"
        command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{jax.ffi.include_dir()}", "-o", str(library)]
        try:
            subprocess.run([*command, str(SOURCE)], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise SystemExit("This benchmark needs a C++ compiler. Install g++.") from None
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"g++ could not build {SOURCE.name}:\n{error.stderr}") from None
        handler = ctypes.cdll.LoadLibrary(str(library)).SleepHandler
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform="cpu")


class SleepingLayer(nnx.Module):
    """`seconds` for each of forward, the gradient of the input and that of the weights; perhaps for each row."""

    def __init__(self, seconds: tuple[float, float, float], *, of_each_row: bool = False):
        self.weight = nnx.Param(jnp.eye(WIDTH))
        self.seconds = seconds
        self.of_each_row = of_each_row

    def __call__(self, x: jax.Array) -> jax.Array:
        rows = x.shape[0] if self.of_each_row else 1
        forward, backward, weights = (rows * part for part in self.seconds)
        return _product((forward, backward, weights), x, self.weight[...])


def _sleep(x: jax.Array, seconds: float) -> jax.Array:
    call = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, microseconds=np.int64(round(seconds * 1e6)))


def _product_forward(
    seconds: tuple[float, float, float], x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The product keeps XLA from running so cheap a program on the thread that asks for it.
    return _sleep(x @ weight, seconds[0]), (x, weight)


def _product_backward(
    seconds: tuple[float, float, float], kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    return _sleep(dy @ weight.T, seconds[1]), _sleep(x.T @ dy, seconds[2])


_product = jax.custom_vjp(lambda seconds, x, weight: _product_forward(seconds, x, weight)[0], nondiff_argnums=(0,))
_product.defvjp(_product_forward, _product_backward)
