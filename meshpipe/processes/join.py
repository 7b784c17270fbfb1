"""How the processes of a run find each other and connect."""

import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass

import jax

from meshpipe.errors import ArgumentError
from meshpipe.processes.addresses import is_loopback
from meshpipe.processes.config import DistributedConfig, Transfers
from meshpipe.processes.coordination import coordinator_address, share_secret
from meshpipe.processes.exit_codes import FAILED
from meshpipe.processes.secret import VARIABLE, Secret, environment_secret, read_secret_file

JOIN_SECONDS = 300.0
"""How long processes wait for each other to join; hosts may start at different times."""
REPORT_SECONDS = 60.0
"""The same for a process that has failed and joins to say so."""
REMINDER_SECONDS = 30.0
"""Interval of the messages of a process that waits for the others."""
SHUTDOWN_SECONDS = 30


def join(config: DistributedConfig) -> None:
    """Connects to the other processes of the run; does nothing in a run of one process.

    From then on, their messages are signed with the run's secret. Without a secret, one line on standard error warns if
    other machines can reach the coordinator.

    Must be called before JAX is first used. If some processes do not join in time, JAX would abort this process, so it
    exits with a message just before. Raises `ConnectionError` when joining fails earlier, and `ValueError` for an
    unusable secret file, and when the others were given another number of processes.
    """
    _asked.append(config.transfers)
    from_environment = environment_secret()  # removed from the environment in any case
    secret = from_environment if config.secret_file is None else read_secret_file(config.secret_file)
    if config.has_others:
        _join(config, secret, _Patience(config, JOIN_SECONDS, FAILED))


def join_to_report(config: DistributedConfig, status: int) -> None:
    """Joins although this process has failed, so that it can tell the others, which would wait for it.

    If they do not join soon, exits with `status`. Raises `ConnectionError` when joining fails.
    """
    try:
        secret = environment_secret() if config.secret_file is None else read_secret_file(config.secret_file)
    except ArgumentError:  # perhaps what failed; the others will refuse this process, and end
        secret = Secret(b"")
    _join(config, secret, _Patience(config, REPORT_SECONDS, status))


def _join(config: DistributedConfig, secret: Secret, patience: "_Patience") -> None:
    if config.coordinator is not None and config.process_id == 0:
        _check_can_listen(config.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX would abort every process when one is gone; `Guard` ends them with a message that names the checkpoint.
    jax.config.update("jax_enable_recoverability", True)
    # JAX would handle SIGTERM itself, and the signal would be lost until `StopRequest` is entered.
    jax.config.update("jax_enable_preemption_service", False)
    joined = threading.Event()
    threading.Thread(target=patience.watch, args=(joined,), name="join", daemon=True).start()
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


@dataclass(frozen=True)
class _Patience:
    """How long a process waits for the others to join, and its exit code if they do not."""

    config: DistributedConfig
    seconds: float
    status: int

    def watch(self, joined: threading.Event) -> None:
        """Prints regularly that this process is waiting for the others, and ends it after `seconds`."""
        config = self.config
        own = "this process" if config.process_id is None else f"process {config.process_id}"
        where = "" if config.coordinator is None else f" at {config.coordinator}"
        started = time.monotonic()
        while not joined.wait(min(REMINDER_SECONDS, max(0.0, started + self.seconds - time.monotonic()))):
            seconds = time.monotonic() - started
            if seconds >= self.seconds:
                break
            print(
                f"meshpipe: {own} is waiting for {_others(config)} to join{where}; {seconds:.0f} s so far, "
                f"{self.seconds:.0f} s at most.",
                file=sys.stderr,
                flush=True,
            )
        else:
            return
        count = "" if config.process_count is None else f" {config.process_count}"
        print(
            f"meshpipe: {own} stops because not all{count} processes of the run joined{where} "
            f"within {self.seconds:.0f} s. Check their messages, and start all with the same address and count.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(self.status)


def _others(config: DistributedConfig) -> str:
    """Describes the missing processes; JAX does not report how many have joined."""
    if config.process_count is None:
        return "the other processes of the run"
    if config.process_count == 2:
        return "1 of 2 processes"
    return f"some of the other {config.process_count - 1} of {config.process_count} processes"
