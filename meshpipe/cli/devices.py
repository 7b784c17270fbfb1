"""The devices that a command runs on."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from meshpipe.config import Config

DEVICES = "MESHPIPE_CPU_DEVICES"
"""Environment variable in which `launch` passes each process its number of virtual CPU devices."""


def take_devices(config: "Config", console: "Console") -> None:
    """Without an accelerator, gives JAX as many virtual CPU devices as the mesh needs, and prints a line about it."""
    import jax

    from meshpipe.mesh import use_cpu_devices
    from meshpipe.processes.coordination import process_count

    count, processes = config.mesh.num_devices, process_count()
    per_process = int(os.environ.get(DEVICES, 0)) or -(-count // processes)
    use_cpu_devices(per_process)
    if jax.default_backend() == "cpu":
        if per_process * processes != count:
            raise ValueError(
                "On CPU, the processes must have exactly as many devices as the mesh. "
                f"Got {processes} processes of {per_process} for a mesh of {count}. Choose a divisor of {count}."
            )
        shared = f" of {processes} processes" if processes > 1 else ""
        console.print(f"No accelerator: running on {count} virtual CPU device{'s' if count > 1 else ''}{shared}.")
