"""Reading fields: numbers are read unchanged, copied once, and never truncated."""

import array
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from meshpipe.data.arrays import ALIGNMENT, field_shape, own_field, read_field


@pytest.mark.parametrize(
    ("value", "shape"),
    [([[1, 2, 3], [4, 5, 6]], (2, 3)), ((1.5, 2.5), (2,)), (7, ()), ([np.zeros(4), np.ones(4)], (2, 4))],
)
def test_lists_and_numbers_are_arrays(value: Any, shape: tuple[int, ...]) -> None:
    assert read_field("y", value).shape == field_shape("y", value).shape == shape
    assert field_shape("y", value).dtype in (jnp.int32, jnp.float32)


@pytest.mark.parametrize("value", ["text", ["a", "b"], [[1, 2], [3]], np.array([{}]), np.array(["2020"], "M8[D]")])
def test_a_field_that_is_not_numeric_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ValueError, match=r"A field must be an array of numbers\. Got 'words'"):
        read_field("words", value)


@pytest.mark.parametrize(
    "value",
    [
        np.arange(100, dtype=np.float32),
        np.arange(100, dtype=np.float32)[::-1],
        array.array("f", range(100)),
        memoryview(np.arange(100, dtype=np.float32)),
        np.arange(100, dtype=np.float64),
        np.arange(100, dtype=">f4"),
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_a_field_is_copied_to_where_xla_reads_it_in_place(value: Any) -> None:
    own = own_field("y", value, jnp.float32)
    assert own.dtype == np.float32
    np.testing.assert_array_equal(own, value)
    assert not np.shares_memory(own, np.asarray(value))
    assert own.ctypes.data % ALIGNMENT == 0
    placed = jax.device_put(own, jax.devices()[0])
    assert placed.unsafe_buffer_pointer() == own.ctypes.data, "one copy is made in all"


def test_jax_arrays_are_not_copied() -> None:
    value = jnp.arange(1000.0)
    own = own_field("y", value, jnp.float32)
    assert own.ctypes.data == value.unsafe_buffer_pointer()
    jax.jit(lambda x: x * 0, donate_argnums=0)(value)
    np.testing.assert_array_equal(own, np.arange(1000))
    value = jnp.arange(1000.0)
    own = own_field("y", value, jnp.float32)
    value.delete()
    others = [jnp.full(1000, -1.0) for _ in range(8)]
    np.testing.assert_array_equal(own, np.arange(1000))
    del others


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (np.array([1, 2**40]), jnp.int32),
        (np.array([-(2**31) - 1]), jnp.int32),
        (np.array([2**32], np.uint64), jnp.uint32),
        (np.array([1.0, 1e300]), jnp.float32),
        (np.array([1e300j]), jnp.complex64),
        ([2**24 + 1], jnp.float32),
    ],
)
def test_numbers_that_do_not_fit_are_refused(value: Any, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"must fit into its dtype on devices. Got 'tokens' of dtype"):
        own_field("tokens", value, dtype)


def test_numbers_that_fit_are_accepted() -> None:
    np.testing.assert_array_equal(own_field("y", np.array([2**31 - 1, -(2**31)]), jnp.int32), [2**31 - 1, -(2**31)])
    np.testing.assert_array_equal(own_field("y", np.array([np.inf, np.nan, 1.0]), jnp.float32), [np.inf, np.nan, 1.0])
    np.testing.assert_array_equal(own_field("y", [1, 2], jnp.float32), [1, 2])
    own = own_field("y", np.ones(3, ml_dtypes.bfloat16), jnp.bfloat16)
    assert own.dtype == jnp.bfloat16


def test_another_dtype_is_refused_with_both() -> None:
    for value in (np.ones(2, np.float16), np.ones(2, np.int32), np.ones(2, bool), np.ones(2, np.complex64)):
        with pytest.raises(ValueError, match=f"'x' of dtype {value.dtype}, and float32 in the example"):
            own_field("x", value, jnp.float32)
