"""How a process joins the others of its run."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from meshpipe.errors import ArgumentError, check_number
from meshpipe.processes.addresses import check_one_address

Transfers = Literal["auto", "sockets", "server"]


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How this process joins the others of its run. By default a run has one process, unless it runs on a cluster.

    Tasks of Slurm (`srun`), Open MPI and Cloud TPU need no settings: `jax.distributed.initialize` detects them.
    """

    coordinator: str | None = None
    """HOST:PORT at which process 0 listens, the same for all processes; HOST must be reachable by all of them."""
    process_id: int | None = None
    """Number of this process, from 0."""
    process_count: int | None = None
    """Processes of the run; each is started with the same command and its own number."""
    transfers: Transfers = "auto"
    """How arrays move between processes. `auto` uses the backend's own transport (NCCL on GPUs), on CPU `sockets`, and
    on TPUs of three or more hosts `server`. `sockets` goes through host memory, which is slower but also works when
    processes share a GPU; `server` is JAX's transfer server, which does so too, in JAX's runtime."""
    step_timeout: float = 0.0
    """Seconds without a finished step before the run fails and names what each rank waits for; 0 waits for ever."""

    secret_file: str | None = None
    """File with the secret of the run, the same for all processes: 32 or more random characters, readable only by this
    user. By default the environment variable MESHPIPE_SECRET is used, which `launch` sets."""
    allow_any_address: bool = False
    """Allow a --coordinator of 0.0.0.0 or [::], so that process 0 listens on all network interfaces."""

    def __post_init__(self) -> None:
        check_number("step_timeout", self.step_timeout)
        given = [self.coordinator, self.process_id, self.process_count]
        if any(value is not None for value in given) and any(value is None for value in given):
            raise ArgumentError(
                "`coordinator`, `process_id` and `process_count` must be given together. "
                f"Got {self.coordinator}, {self.process_id} and {self.process_count}. Give all three, or none."
            )
        if self.coordinator is None or self.process_id is None or self.process_count is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ArgumentError(f"`coordinator` must be HOST:PORT, e.g. 10.0.0.5:4321. Got {self.coordinator!r}.")
        if not self.allow_any_address:
            check_one_address("coordinator", host)
        if not 0 <= self.process_id < self.process_count:
            raise ArgumentError(
                "`process_id` must be at least 0 and below `process_count`. "
                f"Got {self.process_id} of {self.process_count}."
            )

    @property
    def has_others(self) -> bool:
        """Whether the run has several processes."""
        return self.process_count != 1 and (self.coordinator is not None or in_cluster(os.environ))


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a job that JAX can detect."""
    sizes = (environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(size not in ("", "1") for size in sizes) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
