"""Reads the fields of examples and batches as arrays, from NumPy arrays, JAX arrays, lists and numbers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from meshpipe.errors import ArgumentError

ALIGNMENT = 64
"""XLA's CPU backend reads host memory in place if it starts at a multiple of this; otherwise it copies."""


def read_field(name: str, value: Any) -> np.ndarray:
    """The field as a NumPy array, which may share memory with the value. A list of lists is a matrix.

    Raises `ValueError` if it is not an array of numbers: strings, objects, lists of unequal lengths.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ArgumentError(
            f"A field must be an array of numbers. Got {name!r} with parts of different shapes. Pad them to one length."
        ) from error
    if not _is_numeric(array.dtype):
        raise ArgumentError(
            f"A field must be an array of numbers. Got {name!r} of dtype {array.dtype}. Encode strings and objects as "
            "numbers, and pad lists to one length."
        )
    return array


def field_shape(name: str, value: Any) -> jax.ShapeDtypeStruct:
    """The shape of a field, and its dtype on devices: JAX truncates 64 bits to 32 by default.

    Raises `ValueError` as `read_field` does.
    """
    if not isinstance(value, jax.ShapeDtypeStruct | jax.Array):
        value = read_field(name, value)
    elif not _is_numeric(value.dtype):
        raise ArgumentError(f"A field must be an array of numbers. Got {name!r} of dtype {value.dtype}.")
    return jax.ShapeDtypeStruct(value.shape, _on_devices(value.dtype))


def own_field(name: str, value: Any, dtype: Any) -> np.ndarray:
    """The field in memory of its own, with its dtype on devices.

    It is copied once, aligned so that XLA's CPU backend can read it in place. JAX arrays are immutable and not copied.
    Raises `ValueError` if the dtypes differ, or numbers do not fit.
    """
    array = read_field(name, value)
    if array.dtype == dtype and isinstance(value, jax.Array):
        return array
    # Lists and numbers have no dtype of their own, so integers may stand for floats.
    like = _on_devices(array.dtype) == dtype or (
        not hasattr(value, "dtype") and np.can_cast(array.dtype, dtype, "same_kind")
    )
    if not like:
        raise ArgumentError(
            f"Every batch field must have the dtype of the example batch. Got {name!r} of dtype {array.dtype}, and "
            f"{np.dtype(dtype)} in the example. Convert it with .astype({str(np.dtype(dtype))!r})."
        )
    own = _aligned(array.shape, dtype)
    with np.errstate(all="ignore"):
        np.copyto(own, array, casting="unsafe")
    if own.dtype != array.dtype and not _fits(array, own):
        raise ArgumentError(
            f"The numbers of a field must fit into its dtype on devices. Got {name!r} of dtype {array.dtype}, from "
            f"{array.min()} to {array.max()}, for {own.dtype}. Make them smaller, or enable jax_enable_x64."
        )
    return own


def copy_batch(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A copy of the batch as NumPy arrays."""
    return {name: np.array(read_field(name, value)) for name, value in batch.items()}


def _is_numeric(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)


def _on_devices(dtype: Any) -> np.dtype:
    return np.dtype(jax.dtypes.canonicalize_dtype(np.dtype(dtype).newbyteorder("=")))


def _fits(array: np.ndarray, cast: np.ndarray) -> bool:
    """Whether the cast changed no integer, and made no number infinite."""
    if jnp.issubdtype(array.dtype, np.inexact):
        return bool(np.isfinite(cast).all()) or not (np.isinf(cast) & np.isfinite(array)).any()
    return bool((cast == array).all())


def _aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)
