"""Moving the arrays of one boundary from a submesh to another."""

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Sharding

Arrays = tuple[jax.Array, ...]


def transfer_to(shardings: tuple[Sharding, ...]) -> Callable[[Arrays], Arrays]:
    """A function that moves flat arrays onto the shardings, asynchronously.

    One `jax.device_put` for all of them: nearly all of its cost is Python and per call. A submesh of one device is
    named by that device, which takes half as long as a sharding. The arrays that are sent must not be donated
    afterwards; the engine donates only accumulators, which never move.
    """
    devices = {device for sharding in shardings for device in sharding.device_set}
    if len(devices) == 1:
        return partial(jax.device_put, device=devices.pop())
    return partial(jax.device_put, device=shardings)
