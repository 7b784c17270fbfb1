"""Errors that mean that another process is gone, recognised by their origin, not only by their text."""

import jax
import jax.numpy as jnp
import pytest

from meshpipe.processes.guard import is_lost_connection


def raised(function: object, *arguments: object) -> Exception:
    with pytest.raises(Exception, match="Connection") as caught:
        function(*arguments)  # type: ignore[operator]
    return caught.value


def test_user_errors_are_not_lost_connections() -> None:
    def recipe() -> None:
        raise ValueError("Connection string is missing")

    def source() -> None:
        raise ConnectionResetError("Connection reset by peer: recv() of the data server failed")

    assert not is_lost_connection(raised(recipe))
    assert not is_lost_connection(raised(source))


def test_an_error_in_a_callback_is_not_a_lost_connection() -> None:
    def fails(x: object) -> None:
        raise ValueError("Connection refused by the feature server")

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        return jax.pure_callback(fails, jax.ShapeDtypeStruct((), jnp.float32), x)

    error = raised(lambda: float(program(jnp.float32(1))))
    assert isinstance(error, jax.errors.JaxRuntimeError)
    assert not is_lost_connection(error)


def test_errors_raised_by_jax_are_lost_connections() -> None:
    assert is_lost_connection(jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"))
    assert not is_lost_connection(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))


def test_an_error_caused_by_a_lost_connection_is_one() -> None:
    """E.g. a save that fails because process 0 is gone."""
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: failed to ask")
    error = OSError("Step 80 could not be saved")
    error.__cause__ = lost
    assert is_lost_connection(lost)
    assert is_lost_connection(error)
    assert not is_lost_connection(OSError("UNAVAILABLE: a disk"))
