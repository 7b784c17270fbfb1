"""The key-value store, barriers and heartbeats of a run, on the coordination service that `jax.distributed` starts.

The public API of JAX has no key-value store, so this module uses a private name, `jax._src.distributed`, whose client
Orbax uses too. The import happens only after `jax.distributed` has started, so a run of one process does not need it.
The test of this module fails when the name moves.

Anyone who reaches the coordinator's port can read, write and delete keys. Key names are therefore derived from the
secret of the run and values are signed; anything else is rejected.
"""

import itertools
import time
from typing import Any

import jax

from meshpipe.errors import ArgumentError
from meshpipe.processes.secret import IntrusionError, Secret, current, use

POLL_SECONDS = 0.02
CHECK_SECONDS = 1.0
"""Interval at which a waiting process checks that its own keys still exist."""


def process_count() -> int:
    """The number of processes of this run; 1 without `jax.distributed`. Does not start JAX's backend."""
    return (_service().num_processes or 1) if jax.distributed.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0. Does not start JAX's backend."""
    return (_service().process_id or 0) if jax.distributed.is_initialized() else 0


def coordinator_address() -> str | None:
    """HOST:PORT of process 0, given by the user or found by the cluster; None in a run of one process."""
    return _service().coordinator_address if jax.distributed.is_initialized() else None


def share_secret(secret: Secret, nonce: str, timeout: float) -> None:
    """Derives a secret for this run alone from the user's secret, which many runs may share, and uses it.

    Every process contributes a random `nonce`, so values signed in another run cannot be replayed to it. Raises
    `ArgumentError` when processes have been given another number of processes.
    """
    use(secret)
    count, nonces = process_count(), []
    set_key(f"{_NONCE}/{process_index()}", f"{count} {nonce}")
    for process in range(count):
        said, _, text = wait_for_key(f"{_NONCE}/{process}", timeout).partition(" ")
        if said != str(count):
            raise ArgumentError(
                f"All processes must be given the same `process_count`. Got {count} in process {process_index()}, and "
                f"{said} in process {process}. Start all with the same number."
            )
        nonces.append(text)
    use(secret.derive(*nonces))
    # Signed with the user's secret, so it is no longer one of the keys that are checked with that of the run.
    _own_keys.pop(f"{_NONCE}/{process_index()}", None)


def set_key(key: str, text: str) -> None:
    """Sets a key, which can be set only once, for all processes.

    Raises `RuntimeError` when the key exists or the coordinator is gone, and `IntrusionError` when someone without the
    run's secret has set it.
    """
    secret = current()
    try:
        _client().key_value_set(_name(key), secret.sign(key, process_index(), text))
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" in str(error):
            try_get_key(key)
        raise
    _own_keys[key] = None


def try_get_key(key: str) -> str | None:
    """The value of a key, or None if it is not set. Raises `IntrusionError` for a value from outside this run."""
    try:
        signed = _client().key_value_try_get(_name(key))
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
    return current().check(key, signed)


def wait_for_key(key: str, timeout: float) -> str:
    """Waits until a key is set and returns its value. Raises `TimeoutError` after `timeout` seconds.

    Polls, because a thread inside a blocking call would keep the process from ending. Raises `IntrusionError` when
    someone outside the run has set the key, or has deleted a key of this process in the meantime.
    """
    start = now = time.monotonic()
    deadline, next_check = now + timeout, now + CHECK_SECONDS
    while (text := try_get_key(key)) is None:
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError(f"No process set {key} within {timeout:.0f} s.")
        if now > next_check:
            check_own_keys()
            next_check = now + CHECK_SECONDS
        time.sleep(min(POLL_SECONDS, 0.001 + (now - start) / 8))  # soon again where the wait is short
    return text


def all_gather(topic: str, text: str, timeout: float) -> list[str]:
    """The texts of all processes in order of process. Each topic can be used only once."""
    set_key(f"{topic}/{process_index()}", text)
    return [wait_for_key(f"{topic}/{process}", timeout) for process in range(process_count())]


def delete_key(key: str) -> None:
    """Deletes a key and the keys below it. No process may read them afterwards.

    A process may delete only its own keys, and keys that the process that set them has already deleted.
    """
    for own in tuple(_own_keys):
        if own == key or own.startswith(f"{key}/"):
            _own_keys.pop(own, None)
    _client().key_value_delete(_name(key))


def check_own_keys() -> None:
    """Raises `IntrusionError` when someone outside the run has deleted or replaced a key that this process has set.

    A process that waits for a deleted key cannot distinguish it from one not set yet, so the process that set it
    checks.
    """
    for key in tuple(_own_keys):
        if try_get_key(key) is None and key in _own_keys:  # else this process has deleted it since
            raise IntrusionError(
                f"someone outside the run deleted {key} from the key-value store of the run. Run on a private network."
            )


def barrier(name: str, timeout: float) -> None:
    """Waits until every process has reached the barrier. Each name can be used only once."""
    if process_count() > 1:
        _client().wait_at_barrier(_name(name), round(timeout * 1000))


def send_heartbeat(text: str) -> None:
    """Sends a heartbeat of this process, with a text for its readers."""
    key = f"{_HEARTBEATS}/{process_index()}"
    signed = current().sign(key, process_index(), f"{next(_heartbeat_counts)} {text}")
    _client().key_value_set(f"{_name(_HEARTBEATS)}/{process_index()}", signed, allow_overwrite=True)


def heartbeats() -> dict[int, tuple[int, str]]:
    """By process, the number of heartbeats it has sent and the text of the last. Omits processes that sent none.

    Raises `IntrusionError` for a heartbeat from outside this run.
    """
    folder = _name(_HEARTBEATS)
    signed = dict(_client().key_value_dir_get(folder))
    found = {}
    for process in range(process_count()):
        if (value := signed.get(f"{folder}/{process}")) is not None:
            count, _, text = current().check(f"{_HEARTBEATS}/{process}", value).partition(" ")
            found[process] = int(count), text
    return found


_NONCE = "meshpipe/nonce"
_HEARTBEATS = "meshpipe/alive"
_heartbeat_counts = itertools.count(1)
_own_keys: dict[str, None] = {}
"""The keys that this process has set and not deleted."""


def _name(key: str) -> str:
    """The name of a key in the store. Keys with a common path prefix share a folder.

    The names of nonces are not derived from the secret, so that a process with a different secret is noticed.
    """
    if key.startswith(f"{_NONCE}/"):
        return key
    first, *rest = itertools.accumulate(key.split("/"), "{}/{}".format)
    return "/".join([first, *map(current().name, rest)])


def _client() -> Any:
    assert jax.distributed.is_initialized(), "jax.distributed was not started"
    return _service().client


def _service() -> Any:
    """JAX's distributed state: the client of the key-value store, process numbers and addresses.

    Raises `RuntimeError` for a version of JAX that keeps it elsewhere.
    """
    try:
        from jax._src.distributed import global_state

        for name in ("client", "coordinator_address", "num_processes", "process_id"):
            getattr(global_state, name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "Several processes need the key-value store of jax.distributed, which is private API of JAX. jax "
            f"{jax.__version__} does not have it where meshpipe expects it ({error}). Install another version of jax "
            "or of meshpipe, or run one process."
        ) from error
    return global_state
