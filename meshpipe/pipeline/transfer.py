"""Moves the arrays of a value, or of its gradient, from a submesh to another, within a process or between processes."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from meshpipe.pipeline.ways import carrier, way_between_processes
from meshpipe.sharding import Arrays, Shapes, is_local


def transfer_to(shardings: tuple[Sharding, ...]) -> Callable[[Any], Any]:
    """A function that asynchronously moves flat arrays onto the shardings, which are all in this process.

    It calls `jax.device_put` once for all arrays, since nearly all of its cost is Python, per call. For a submesh of
    one device it passes the device, which takes half as long as a sharding. Arrays that are sent must not be donated
    afterwards; the engine donates only accumulators, which never move.
    """
    devices = {device for sharding in shardings for device in sharding.device_set}
    if len(devices) == 1:
        return partial(jax.device_put, device=devices.pop())
    return partial(jax.device_put, device=shardings)


def transfer_between(name: str, source: Mesh, shapes: Shapes) -> Callable[[Arrays | None], Arrays | None]:
    """A function that asynchronously moves flat arrays from submesh `source` to the shardings of `shapes`.

    Exactly the processes of both submeshes must create it and call it, in the same order for the same `name`. A process
    without a device of the source passes None, and one without a device of the target gets None. Both submeshes have
    the same shape, and the arrays the same specs on both. `name` is unique, and the same in all processes.
    """
    here = jax.process_index()
    if not shapes:  # the gradient of a value that holds integers alone
        return lambda arrays: ()
    target = _mesh_of(shapes[0])
    pairs = list(zip(source.devices.flat, target.devices.flat, strict=True))
    places = {device.process_index for pair in pairs for device in pair}
    if places <= {here}:
        return transfer_to(tuple(map(_sharding_of, shapes)))
    # Where every part stays in its process, nothing is opened; `jax.device_put` refuses arrays of several processes.
    processes = [(a.process_index, b.process_index) for a, b in pairs]
    if way_between_processes() != "native" or all(a == b for a, b in processes):
        return _Carried(name, pairs, shapes).move
    check_native(processes)
    return _native(source, shapes)


def check_native(processes: Sequence[tuple[int, int]]) -> None:
    """Raises `ValueError` for moves between these pairs of processes that `jax.device_put` refuses."""
    sources, targets = map(set, zip(*processes, strict=True))
    if sources == targets:
        raise ValueError(
            "On accelerators, where two submeshes lie in the same processes, the devices at each position of both must "
            f"be of one process. Got submeshes on processes {sorted(sources)} in different orders. "
            "Order the devices of the mesh by process, or pass DistributedConfig(transfers='sockets') "
            "(--transfers sockets)."
        )


def _native(source: Mesh, shapes: Shapes) -> Callable[[Arrays | None], Arrays | None]:
    """Uses the backend's own transport, through `jax.device_put` (GPU, TPU).

    All arrays of a move are in one call: between each two devices, they then go as one group of sends and receives.
    """
    shardings = tuple(map(_sharding_of, shapes))
    receives, sends = is_local(_mesh_of(shapes[0])), is_local(source)
    elsewhere = tuple(
        jax.make_array_from_single_device_arrays(
            shape.shape, NamedSharding(source, sharding.spec), [], dtype=shape.dtype
        )
        for shape, sharding in zip(shapes, shardings, strict=True)
        if not sends
    )

    def move(arrays: Arrays | None) -> Arrays | None:
        moved = jax.device_put(elsewhere if arrays is None else arrays, shardings)
        return moved if receives else None

    return move


class _Carried:
    """Uses sockets, or JAX's transfer server, between the two processes of each pair of devices at the same position in
    both submeshes.
    """

    def __init__(self, name: str, pairs: Sequence[tuple[jax.Device, jax.Device]], shapes: Shapes):
        if any(shape.size == 0 for shape in shapes):
            raise ValueError(
                f"Arrays that move between processes must not be empty. Got shapes {[shape.shape for shape in shapes]} "
                f"for {name}. Do not pass empty arrays between layers."
            )
        here = jax.process_index()
        self._shapes = shapes
        self._count = 0
        self._name = name
        self._stays = [(a, b) for a, b in pairs if a.process_index == b.process_index == here]
        sends: dict[int, list[jax.Device]] = defaultdict(list)
        receives: dict[int, list[jax.Device]] = defaultdict(list)
        for a, b in pairs:
            if a.process_index == here != b.process_index:
                sends[b.process_index].append(a)
            if b.process_index == here != a.process_index:
                receives[a.process_index].append(b)
        self._sends, self._receives = dict(sends), dict(receives)
        self._is_target = any(b.process_index == here for _, b in pairs)
        # Between exactly one process and one other, arrays move whole.
        self._whole = len({a.process_index for a, _ in pairs}) == len({b.process_index for _, b in pairs}) == 1
        if sends or receives:
            self._carrier = carrier()
        for process in sends:
            self._carrier.connect(process)

    def move(self, arrays: Arrays | None) -> Arrays | None:
        self._count += 1
        if self._whole:
            return self._move_whole(arrays)
        parts = [] if arrays is None else [{s.device: s.data for s in array.addressable_shards} for array in arrays]
        for process, devices in self._sends.items():
            self._carrier.send(
                process, self._number_for(process), [part[device] for part in parts for device in devices]
            )
        if not self._is_target:
            return None
        arrived: list[dict[jax.Device, jax.Array]] = [{} for _ in self._shapes]
        if parts and self._stays:
            targets = [target for _, target in self._stays] * len(parts)
            stay = [part[source] for part in parts for source, _ in self._stays]
            moved = iter(jax.device_put(stay, targets))
            for into in arrived:
                into.update((target, next(moved)) for _, target in self._stays)
        for process, devices in self._receives.items():
            wanted = tuple(self._part_on(shape, device) for shape in self._shapes for device in devices)
            received = iter(self._carrier.receive(process, self._number_for(jax.process_index()), wanted))
            for into in arrived:
                into.update((device, next(received)) for device in devices)
        return tuple(
            jax.make_array_from_single_device_arrays(
                shape.shape, shape.sharding, list(into.values()), dtype=shape.dtype
            )
            for shape, into in zip(self._shapes, arrived, strict=True)
        )

    def _move_whole(self, arrays: Arrays | None) -> Arrays | None:
        for process in self._sends:
            assert arrays is not None
            self._carrier.send(process, self._number_for(process), arrays)
        for process in self._receives:
            return tuple(self._carrier.receive(process, self._number_for(jax.process_index()), self._shapes))
        return None

    def _number_for(self, receiver: int) -> int:
        """A number unique at the sender: derived from name, receiver and the number of calls."""
        return self._carrier.number_of(self._name, receiver, self._count)

    @staticmethod
    def _part_on(shape: jax.ShapeDtypeStruct, device: jax.Device) -> jax.ShapeDtypeStruct:
        size = _sharding_of(shape).shard_shape(shape.shape)
        return jax.ShapeDtypeStruct(size, shape.dtype, sharding=SingleDeviceSharding(device))


def _sharding_of(shape: jax.ShapeDtypeStruct) -> NamedSharding:
    assert isinstance(shape.sharding, NamedSharding)
    return shape.sharding


def _mesh_of(shape: jax.ShapeDtypeStruct) -> Mesh:
    mesh = _sharding_of(shape).mesh
    assert isinstance(mesh, Mesh)
    return mesh
