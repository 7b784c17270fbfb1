"""Short texts that the processes of a run tell each other, through the service that `jax.distributed` starts.

The public API of JAX has no key-value store, so this module uses a private name, `jax._src.distributed`, whose client
Orbax uses too. It is imported once `jax.distributed` was started, so a run of one process does not need it; the test of
this module fails when it moves.
"""

import time
from typing import Any

import jax

POLL_SECONDS = 0.02


def process_count() -> int:
    """Processes of this run; 1 where `jax.distributed` was not started. Does not start JAX's backend."""
    return (_service().num_processes or 1) if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0. Does not start JAX's backend."""
    return (_service().process_id or 0) if jax.distributed.is_initialized() else 0


def coordinator_address() -> str | None:
    """HOST:PORT of process 0, also where a cluster said it; None without other processes."""
    return _service().coordinator_address if jax.distributed.is_initialized() else None


def tell(key: str, text: str) -> None:
    """Writes a key once for all processes. Raises `RuntimeError` when it is there already, or the service is gone."""
    _client().key_value_set(key, text)


def ask_now(key: str) -> str | None:
    """What was told, or None."""
    try:
        return _client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def ask(key: str, timeout: float) -> str:
    """Waits until it is told. Raises `TimeoutError` after `timeout` seconds.

    Looks again and again: a thread inside a blocking call would not let the process end.
    """
    deadline = time.monotonic() + timeout
    while (text := ask_now(key)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"No process told {key} within {timeout:.0f} s.")
        time.sleep(POLL_SECONDS)
    return text


def tell_all(topic: str, text: str, timeout: float) -> list[str]:
    """Tells this process's text under a topic that is used once, and waits for those of all processes, in order."""
    tell(f"{topic}/{process_index()}", text)
    return [ask(f"{topic}/{process}", timeout) for process in range(process_count())]


def delete(key: str) -> None:
    """Forgets a key, and those below it, once nobody will read them any more."""
    _client().key_value_delete(key)


def meet(name: str, timeout: float) -> None:
    """Waits until every process has come to the meeting of this name, which is used once."""
    if process_count() > 1:
        _client().wait_at_barrier(name, round(timeout * 1000))


def beat() -> None:
    """Gives a sign of life."""
    _client().key_value_set(f"{_BEATS}/{process_index()}", str(time.time()), allow_overwrite=True)


def beats() -> dict[int, str]:
    """The last sign of life of every process that has given one."""
    found = _client().key_value_dir_get(_BEATS)
    return {int(key.rpartition("/")[2]): text for key, text in found}


_BEATS = "meshpipe/alive"


def _client() -> Any:
    assert jax.distributed.is_initialized(), "jax.distributed was not started"
    return _service().client


def _service() -> Any:
    """What JAX knows of the other processes: the client of the key-value store, numbers and addresses.

    Raises `RuntimeError` for a version of JAX that keeps it elsewhere.
    """
    try:
        from jax._src.distributed import global_state

        for name in ("client", "coordinator_address", "num_processes", "process_id"):
            getattr(global_state, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "Several processes need the key-value store of jax.distributed, which is a private part of JAX. jax "
            f"{jax.__version__} does not have it where meshpipe looks for it ({error}). Install another version of jax "
            "or of meshpipe, or run one process."
        ) from error
    return global_state
