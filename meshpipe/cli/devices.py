"""The devices that a command runs on."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from meshpipe.accelerators import Accelerator, find_accelerators, hidden_by, remedy

if TYPE_CHECKING:
    import jax
    from rich.console import Console

    from meshpipe.mesh import MeshConfig

DEVICES = "MESHPIPE_CPU_DEVICES"
"""Environment variable in which `launch` passes each process its number of virtual CPU devices."""


def take_devices(
    mesh: "MeshConfig",
    console: "Console",
    accelerators: Sequence[Accelerator] | None = None,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Without an accelerator, gives JAX as many virtual CPU devices as the mesh needs, and prints a line about it; with
    accelerators, prints how many of them are idle.

    `accelerators` are those of this machine; by default they are looked for.
    """
    import jax

    from meshpipe.mesh import use_cpu_devices
    from meshpipe.processes.coordination import process_count

    count, processes = mesh.num_devices, process_count()
    per_process = int(environment.get(DEVICES, 0)) or -(-count // processes)
    use_cpu_devices(per_process)
    if jax.default_backend() == "cpu":
        if per_process * processes != count:
            raise ValueError(
                "On CPU, the processes must have exactly as many devices as the mesh. "
                f"Got {processes} processes of {per_process} for a mesh of {count}. Choose a divisor of {count}."
            )
        shared = f" of {processes} processes" if processes > 1 else ""
        _tell_of_unused(console, find_accelerators() if accelerators is None else accelerators, environment)
        console.print(f"No accelerator: running on {count} virtual CPU device{'s' if count > 1 else ''}{shared}.")
    else:
        tell_of_idle(console, count, jax.devices())


def tell_of_idle(console: "Console", used: int, devices: "Sequence[jax.Device]") -> None:
    """A line where a mesh has fewer devices than there are."""
    if used < len(devices):
        console.print(
            f"{len(devices) - used} of the {len(devices)} {devices[0].device_kind} devices are idle: the mesh has "
            f"{used}. --mesh.data, --mesh.pipeline and --mesh.tensor make it larger; `meshpipe advise` compares them.",
            markup=False,
        )


def _tell_of_unused(console: "Console", accelerators: Sequence[Accelerator], environment: Mapping[str, str]) -> None:
    """A line for each accelerator that JAX does not see, unless the user has hidden it."""
    from meshpipe.environment import plugins, versions

    for accelerator in accelerators:
        if hidden_by(accelerator, environment) is None:
            console.print(
                f"JAX does not see the {accelerator.kind} of this machine ({accelerator.found[0]}). "
                f"{remedy(accelerator, versions() | plugins(), environment)} `meshpipe doctor` says more.",
                markup=False,
            )
