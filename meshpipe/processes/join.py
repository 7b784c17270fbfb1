"""How the processes of a run find each other and connect."""

import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping

import jax

from meshpipe.processes.addresses import is_loopback
from meshpipe.processes.config import DistributedConfig, Transfers
from meshpipe.processes.coordination import coordinator_address, share_secret
from meshpipe.processes.exit_codes import FAILED
from meshpipe.processes.secret import VARIABLE, Secret, environment_secret, read_secret_file

JOIN_SECONDS = 300.0
"""How long processes wait for each other to join; hosts may start at different times."""
REMINDER_SECONDS = 30.0
"""Interval of the messages of a process that waits for the others."""
SHUTDOWN_SECONDS = 30


def join(config: DistributedConfig) -> None:
    """Connects to the other processes of the run; does nothing in a run of one process.

    From then on, their messages are signed with the run's secret. Without a secret, one line on standard error warns if
    other machines can reach the coordinator.

    Must be called before JAX is first used. If some processes do not join in time, JAX would abort this process, so it
    exits with a message just before. Raises `ConnectionError` when joining fails earlier, and `ValueError` for an
    unusable secret file.
    """
    _asked.append(config.transfers)
    from_environment = environment_secret()  # removed from the environment in any case
    secret = from_environment if config.secret_file is None else read_secret_file(config.secret_file)
    if config.coordinator is None and not _in_cluster(os.environ):
        return
    if config.process_count == 1:
        return
    if config.coordinator is not None and config.process_id == 0:
        _check_can_listen(config.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX would abort every process when one is gone; `Guard` ends them with a message that names the checkpoint.
    jax.config.update("jax_enable_recoverability", True)
    # JAX would handle SIGTERM itself, and the signal would be lost until `StopRequest` is entered.
    jax.config.update("jax_enable_preemption_service", False)
    joined = threading.Event()
    threading.Thread(target=_watch_joining, args=(config, joined), name="join", daemon=True).start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.process_count,
            config.process_id,
            initialization_timeout=2 * round(JOIN_SECONDS),
            coordinator_bind_address=config.coordinator if config.process_id == 0 else None,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except Exception as error:
        raise ConnectionError(
            f"Process {config.process_id} could not join the {config.process_count} of the run at "
            f"{config.coordinator}: {error}"
        ) from error
    else:
        _warn_without(secret)
        share_secret(secret, secrets.token_hex(16), JOIN_SECONDS)
    finally:
        joined.set()


def transfers_asked() -> Transfers:
    """What the config says with which this process has joined its run."""
    return _asked[-1] if _asked else "auto"


_asked: list[Transfers] = []


def _warn_without(secret: Secret) -> None:
    host = (coordinator_address() or "").rpartition(":")[0].strip("[]")
    if not secret and not is_loopback(host):
        print(
            f"meshpipe: this run has no secret: anyone who reaches {host} can tamper with it. Give all processes the "
            f"same --secret-file FILE or {VARIABLE}, made by openssl rand -hex 32.",
            file=sys.stderr,
            flush=True,
        )


def _check_can_listen(address: str) -> None:
    """Raises `ConnectionError` when the port is in use; JAX would wait for ever."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections in TIME_WAIT
            probe.bind(place)
    except OSError as error:
        raise ConnectionError(
            f"Process 0 must be able to listen at --coordinator. Got {address}: {error.strerror}. "
            "Name an address of its own machine and a free port, and start process 0 only once."
        ) from error


def _watch_joining(config: DistributedConfig, joined: threading.Event) -> None:
    """Prints regularly that this process is waiting for the others, and ends it after `JOIN_SECONDS`."""
    own = "this process" if config.process_id is None else f"process {config.process_id}"
    where = "" if config.coordinator is None else f" at {config.coordinator}"
    started = time.monotonic()
    while not joined.wait(min(REMINDER_SECONDS, max(0.0, started + JOIN_SECONDS - time.monotonic()))):
        seconds = time.monotonic() - started
        if seconds >= JOIN_SECONDS:
            break
        print(
            f"meshpipe: {own} is waiting for {_others(config)} to join{where}; {seconds:.0f} s so far, "
            f"{JOIN_SECONDS:.0f} s at most.",
            file=sys.stderr,
            flush=True,
        )
    else:
        return
    count = "" if config.process_count is None else f" {config.process_count}"
    print(
        f"meshpipe: {own} stops because not all{count} processes of the run joined{where} "
        f"within {JOIN_SECONDS:.0f} s. Check their messages, and start all with the same address and count.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(FAILED)


def _others(config: DistributedConfig) -> str:
    """Describes the missing processes; JAX does not report how many have joined."""
    if config.process_count is None:
        return "the other processes of the run"
    if config.process_count == 2:
        return "1 of 2 processes"
    return f"some of the other {config.process_count - 1} of {config.process_count} processes"


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a job that JAX can detect."""
    sizes = (environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(size not in ("", "1") for size in sizes) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
