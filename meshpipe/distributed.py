"""Several processes of one run: how they find each other, and how all of them end when one fails."""

import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn

import jax

from meshpipe.coordination import ask_now, process_count, process_index, tell

ERROR = "meshpipe/error"
POLL_SECONDS = 0.5
HEARTBEAT_SECONDS = 10
SHUTDOWN_SECONDS = 30
FAILED = 1


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How this process joins others in one run; without any of it, a run has one process unless its cluster says more.

    Slurm, Open MPI, Kubernetes and Cloud TPU are recognised by `jax.distributed.initialize`.
    """

    coordinator: str | None = None
    """HOST:PORT at which process 0 listens, the same for all processes. HOST is the address by which others reach it."""
    process_id: int | None = None
    """Number of this process, from 0."""
    process_count: int | None = None
    """Processes of the run; each starts with the same command and its own number."""

    def __post_init__(self) -> None:
        given = [self.coordinator, self.process_id, self.process_count]
        if any(value is not None for value in given) and any(value is None for value in given):
            raise ValueError(
                "--coordinator, --process-id and --process-count belong together. "
                f"Got {self.coordinator}, {self.process_id} and {self.process_count}. Give all three, or none."
            )
        if self.coordinator is None or self.process_id is None or self.process_count is None:
            return
        host, colon, port = self.coordinator.rpartition(":")
        if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"--coordinator must be HOST:PORT. Got {self.coordinator!r}.")
        if not 0 <= self.process_id < self.process_count:
            raise ValueError(
                f"--process-id must be at least 0 and below --process-count. Got {self.process_id} of "
                f"{self.process_count}."
            )


def join(config: DistributedConfig, address: str | None = None) -> None:
    """Meets the other processes of the run; does nothing for a run of one process.

    Must be called before JAX is first used. Raises `ConnectionError` when they do not come together.
    """
    if config.coordinator is None and not _in_cluster():
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.process_count,
            config.process_id,
            coordinator_bind_address=config.coordinator if config.process_id == 0 else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except Exception as error:
        raise ConnectionError(
            f"Process {config.process_id} of {config.process_count} could not join the others at "
            f"{config.coordinator}: {error}"
        ) from error


def own_address(coordinator: str | None) -> str:
    """The address of this machine's interface that leads to the coordinator, by which other processes reach it."""
    host, _, port = (coordinator or "127.0.0.1:1").rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((host.strip("[]"), int(port)))
        return str(probe.getsockname()[0])


def _in_cluster() -> bool:
    """Whether the environment is that of a job of several processes."""
    sizes = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")
    values = [os.environ.get(name, "") for name in sizes]
    return any(value not in ("", "1", "0") or (name == sizes[2] and value) for name, value in zip(sizes, values, strict=True))


class Guard:
    """While entered, a failure of one process ends all of them within seconds, each with a message that names it.

    Without it the others would wait for arrays that never come, or in the shutdown of JAX for minutes.
    """

    def __init__(self, what_is_saved: "object" = None) -> None:
        self._done = threading.Event()

    def __enter__(self) -> "Guard":
        if process_count() > 1:
            threading.Thread(target=self._watch, name="guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def fail(self, message: str) -> NoReturn:
        """Tells the others why this process ends, and ends it."""
        self._done.set()
        text = f"process {process_index()} on {socket.gethostname()} failed: {message}"
        try:
            tell(ERROR, text)
        except Exception:  # another process was first, or the coordinator is gone
            traceback.print_exc()
        _leave()

    def _watch(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            try:
                message = ask_now(ERROR)
            except Exception:  # the coordinator is gone; JAX itself ends the process
                continue
            if message is not None and not self._done.is_set():
                print(f"meshpipe: process {process_index()} stops because {message}", file=sys.stderr, flush=True)
                _leave()


def _leave() -> NoReturn:
    """Ends the process at once, past JAX's shutdown, which would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process_index() == 0:
        time.sleep(3 * POLL_SECONDS)  # it has the messages, which the others still have to read
    os._exit(FAILED)
