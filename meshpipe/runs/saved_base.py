"""The base of a checkpoint that holds only what was trained: from another checkpoint, or drawn again from its seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from meshpipe.checkpoint.base import Base
from meshpipe.checkpoint.index import check_leaf
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.checkpoint.reader import CheckpointReader
from meshpipe.checkpoint.restore import restore_step
from meshpipe.errors import ArgumentError
from meshpipe.layers.initialise import initialise
from meshpipe.layers.layer import Layer, Leaves
from meshpipe.mesh import DATA, TENSOR
from meshpipe.processes.coordination import process_index
from meshpipe.processes.group import Group
from meshpipe.sharding import ShardingRules
from meshpipe.stage.target import Target
from meshpipe.training.base import digest_of_leaves
from meshpipe.weights import WeightsFolder, is_published


def base_values(
    base: Base,
    layers: Sequence[Layer],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    groups: Sequence[Sequence[str]],
    folder: str | Path | None,
    device: jax.Device,
) -> Leaves:
    """The parameters `wanted`, by leaf path, on one device.

    They are read from `folder`, or from where the run that saved had them. Raises `ArgumentError` when they are not
    there, or are not those that the run had.
    """
    if folder is None and base.folder is None:
        assert base.seed is not None
        found = _first_values(layers, base.seed, groups, device)
        leaves = {path: found[path] for path in wanted}
        where = f"the first values of seed {base.seed}, as they are drawn here,"
    elif is_published(place := folder if folder is not None else str(base.folder)):
        one = SingleDeviceSharding(device)
        leaves = WeightsFolder(place).read(
            {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for path, leaf in wanted.items()}
        )
        where = f"the weights of {place}"
    else:
        reader, step = base_step(base, folder)
        saved = reader.leaves(step)
        for path, leaf in wanted.items():
            check_leaf(step, f"params/{path}", leaf, saved, converts=True)  # the digest tells if that was right
        one = SingleDeviceSharding(device)
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for path, leaf in wanted.items()}
        (tree,) = restore_step(reader, step, [{"params": shapes}], converts=True)
        leaves, where = tree["params"], f"step {step} of {reader.directory}"
    check_digest(base, digest_of_leaves(leaves, Group([process_index()])), where)
    return leaves


def base_step(base: Base, folder: str | Path | None, argument: str | None = "base") -> tuple[CheckpointReader, int]:
    """Where to read a base, in `folder` or where its run had it. Raises `ArgumentError` when nothing is there;
    `argument` names the one for `folder`, if there is one.
    """
    assert folder is not None or base.folder is not None
    reader = reader_of(folder if folder is not None else str(base.folder))
    steps = reader.steps()
    if not steps or (folder is None and base.step not in steps):
        way_out = f"Pass the folder that does as `{argument}`." if argument is not None else "Put it back there."
        raise ArgumentError(
            f"A checkpoint of what was trained needs its {base}, which {reader.directory} does not hold. {way_out}"
        )
    return reader, base.step if base.step in steps else steps[-1]


def check_digest(base: Base, found: str, where: str, argument: str = "base") -> None:
    """Raises `ArgumentError` unless the base is the one that was trained upon."""
    if found != base.digest:
        way_out = f"Pass the folder of the right one as `{argument}`."
        if base.folder is None:
            way_out = (
                "Other versions of JAX, or another kind of device, may draw other values: use it where it was trained. "
                "With `checkpoint_what` all, a run saves its base too."
            )
        raise ArgumentError(
            f"A checkpoint of what was trained must meet the base that it was trained upon: {base}. Got {where} with "
            f"the digest {found[:12]}. {way_out}"
        )


def _first_values(
    layers: Sequence[Layer], seed: int, groups: Sequence[Sequence[str]], device: jax.Device
) -> dict[str, jax.Array]:
    mesh = Mesh(np.array([[device]]), (DATA, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))
    names = {name for layer in layers for axes in layer.axes.values() for name in axes if name is not None}
    rules = ShardingRules(dict.fromkeys(names))
    made = initialise([(layer, mesh) for layer in layers], rules, seed, Target.of(mesh))
    found = {path: jax.device_put(leaf, device) for params, _ in made for path, leaf in params.items()}
    for group in groups:
        found |= {path: found[group[0]] for path in group if path in found and group[0] in found}
    return found
