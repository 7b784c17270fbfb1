"""Gives all processes of a run what the devices of one rank hold."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from meshpipe.pipeline.transfer import transfer_between
from meshpipe.sharding import Arrays, Shapes, abstract, is_local, replicated


class Everywhere:
    """Moves arrays of one submesh to every process, whole; each process makes it and calls it, in the same order.

    The devices of the submesh first exchange their parts. Then each sends all to the device at the same place of other
    ranks, as many of them as it takes to reach all processes.

    Arguments:
        name: Begins the names of its transfers; no other has it.
        source: The submesh that has the arrays.
        meshes: The submeshes of all ranks.
        shapes: Of the arrays.
    """

    def __init__(self, name: str, source: Mesh, meshes: Sequence[Mesh], shapes: Shapes):
        whole = tuple(replicated(source) for _ in shapes)
        self._gather = jax.jit(lambda arrays: arrays, out_shardings=whole) if is_local(source) else None
        self._moves = []
        reached = _processes(source)
        for rank, mesh in enumerate(meshes):
            if _processes(mesh) <= reached:
                continue
            reached |= _processes(mesh)
            if is_local(source) or is_local(mesh):
                wanted = tuple(abstract(shape.shape, shape.dtype, replicated(mesh)) for shape in shapes)
                self._moves.append(transfer_between(f"{name}/to {rank}", source, wanted))

    def __call__(self, arrays: Arrays | None) -> Arrays:
        """The whole arrays on a device of this process; processes without the source pass None. Returns at once."""
        found: Arrays | None = None if self._gather is None else self._gather(arrays)
        for move in self._moves:
            moved = move(found)
            found = moved if found is None else found
        assert found is not None
        return found


def _processes(mesh: Mesh) -> set[int]:
    return {device.process_index for device in mesh.devices.flat}
