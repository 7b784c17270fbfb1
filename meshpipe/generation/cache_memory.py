"""Compares the memory that the caches of texts need with the memory that there is, before anything is allocated."""

from collections.abc import Mapping

from meshpipe.choose.capacity import free_in
from meshpipe.choose.memory import device_bytes
from meshpipe.errors import ArgumentError
from meshpipe.generation.caching_model import CachingModel, is_cache
from meshpipe.machine import format_bytes
from meshpipe.mesh import on_cpu


def check_caches_fit(caching: CachingModel, groups: int, asked: str) -> None:
    """Raises `ArgumentError`, which repeats what was `asked`, when the caches of so many groups of texts do not fit
    into a memory of this process. With the programs, texts need somewhat more than that.
    """
    mesh, free_of = caching.model.mesh, free_in(caching.model.mesh)
    needed = {s: groups * size for s, size in _bytes_of_stages(caching).items()}
    if on_cpu(mesh):
        devices = {s: caching.model.stages[s].submesh.local_devices for s in needed}
        total = sum(len(devices[s]) * size for s, size in needed.items())
        needs = [("the memory of this machine", total, free_of[None])]
    else:
        needs = [
            (f"the memory of {device.platform}:{device.id}", size, free_of[device])
            for s, size in needed.items()
            for device in caching.model.stages[s].submesh.local_devices
        ]
    for where, size, free in needs:
        if free is not None and size > free:
            raise ArgumentError(
                f"The keys and values of all texts in progress must fit into {where}. Got {asked}: they need "
                f"{format_bytes(size)}, and {format_bytes(free)} are free. Lower `max_tokens`, `batch_size` or "
                "`in_flight`, or shorten the prompts."
            )


def _bytes_of_stages(caching: CachingModel) -> Mapping[int, int]:
    """By local stage, the bytes of the caches of a group on each of its devices."""
    return {
        s: device_bytes(leaf for path, leaf in caching.model.parameters[s].state.items() if is_cache(path))
        for s in caching.model.local
    }
