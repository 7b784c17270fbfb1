"""Which errors mean that another process is gone: told by where they come from, not by their words alone."""

import jax
import jax.numpy as jnp
import pytest

from meshpipe.processes.guard import is_lost_connection


def raised(function: object, *arguments: object) -> Exception:
    with pytest.raises(Exception, match="Connection") as caught:
        function(*arguments)  # type: ignore[operator]
    return caught.value


def test_the_users_own_errors_are_no_lost_connection() -> None:
    def recipe() -> None:
        raise ValueError("Connection string is missing")

    def source() -> None:
        raise ConnectionResetError("Connection reset by peer: recv() of the data server failed")

    assert not is_lost_connection(raised(recipe))
    assert not is_lost_connection(raised(source))


def test_an_error_that_a_program_calls_back_into_is_no_lost_connection() -> None:
    def fails(x: object) -> None:
        raise ValueError("Connection refused by the feature server")

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        return jax.pure_callback(fails, jax.ShapeDtypeStruct((), jnp.float32), x)

    error = raised(lambda: float(program(jnp.float32(1))))
    assert isinstance(error, jax.errors.JaxRuntimeError)
    assert not is_lost_connection(error)


def test_errors_of_jax_itself_are() -> None:
    assert is_lost_connection(jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"))
    assert not is_lost_connection(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"))


def test_what_was_raised_because_of_a_lost_connection_is_one() -> None:
    """As where a save fails because process 0 is gone."""
    lost = jax.errors.JaxRuntimeError("UNAVAILABLE: failed to ask")
    error = OSError("Step 80 could not be saved")
    error.__cause__ = lost
    assert is_lost_connection(lost)
    assert is_lost_connection(error)
    assert not is_lost_connection(OSError("UNAVAILABLE: a disk"))
