"""Loads what was trained from a checkpoint: its values, or modules with them. It takes neither trainer nor mesh."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from meshpipe.adapters.lora import with_lora
from meshpipe.adapters.merge import merge_lora
from meshpipe.checkpoint import CheckpointError, list_checkpoints
from meshpipe.checkpoint.base import base_of
from meshpipe.checkpoint.index import WEIGHTS, check_weights
from meshpipe.checkpoint.inspection import reader_of
from meshpipe.checkpoint.reader import CheckpointReader
from meshpipe.checkpoint.restore import restore_step
from meshpipe.errors import ArgumentError
from meshpipe.layers.arguments import check_layers
from meshpipe.layers.examine import abstract_layers
from meshpipe.layers.layer import LayerLike, Leaves
from meshpipe.layers.modules import host_device, modules_with, shared_groups_of
from meshpipe.layers.shared import FACTORS, with_adapters
from meshpipe.runs.saved_base import base_values
from meshpipe.runs.saved_model import saved_lora, saved_model


@overload
def load(directory: str | Path, *, step: int | None = None, device: jax.Device | None = None) -> Leaves: ...
@overload
def load(
    directory: str | Path,
    *,
    layers: Sequence[LayerLike] | Literal["recipe"],
    step: int | None = None,
    tied: Sequence[Sequence[str]] = (),
    device: jax.Device | None = None,
    train: bool = False,
    merged: bool = False,
    base: str | Path | None = None,
) -> list[Any]: ...
def load(
    directory: str | Path,
    *,
    layers: Sequence[LayerLike] | Literal["recipe"] | None = None,
    step: int | None = None,
    tied: Sequence[Sequence[str]] = (),
    device: jax.Device | None = None,
    train: bool = False,
    merged: bool = False,
    base: str | Path | None = None,
) -> Any:
    """The weights of a checkpoint of any layout: parameters and other state by leaf path, or modules with them.

    A checkpoint of adapters holds those alone, and is returned so without `layers`; with them, modules are whole.

    Nothing is compiled except for random streams. The optimizer's state is not read. Every file that is read is
    compared with its checksum.

    Arguments:
        directory: The folder that a run saved to, its `checkpoint_dir` or `run_dir`.
        layers: The layers that were trained, as `Trainer` takes them, to get a new module for each. Or `"recipe"`, for
            the layers of the recipe that was trained, configured as they were saved. That runs the recipe's Python
            file, which the checkpoint names: use it only with checkpoints that you trust.
        step: The step to load; None takes the newest.
        tied: Groups of leaf paths that are one parameter, as `Trainer` takes them: they become one variable, like
            variables that several of the `layers` hold.
        device: The device that holds the arrays; None takes the host's CPU device.
        train: Whether the modules are in training mode; by default they are in evaluation mode.
        merged: Whether the adapters of `meshpipe.lora` are added to their kernels: then the modules are those of the
            base.
        base: The folder with the base of a checkpoint that holds only what was trained; None reads it from where the
            run had it, or draws it from the run's seed again. It is compared with the digest in the checkpoint.

    Raises `CheckpointError`, a `ValueError`, when there is no checkpoint, it is damaged, or a leaf of the layers is
    missing, has another shape or dtype, or is not one of the layers.
    """
    reader = reader_of(directory)
    step = list_checkpoints(reader.directory)[-1] if step is None else step
    device = host_device() if device is None else device
    if layers is None:
        if tied or train or merged or base is not None:
            raise ArgumentError(
                "`tied`, `train`, `merged` and `base` are for `layers`. Got them alone. Pass `layers`, or leave them "
                "out."
            )
        return _read(reader, step, _weights(step, reader.leaves(step)), device)
    if isinstance(layers, str):
        metadata = reader.metadata(step)
        model = saved_model(metadata, reader.directory, layers)
        layers, tied = with_lora(model.layers(), saved_lora(metadata, reader.directory)), (*model.tied(), *tied)
    modules = _modules(reader, step, layers, tied, base, device, train)
    return merge_lora(modules) if merged else modules


def _modules(
    reader: CheckpointReader,
    step: int,
    layers: Sequence[LayerLike],
    tied: Sequence[Sequence[str]],
    base: str | Path | None,
    device: jax.Device,
    train: bool,
) -> list[Any]:
    """New modules for these layers with the values of a step; arguments as those of `load`."""
    saved, metadata = reader.leaves(step), reader.metadata(step)
    check_layers(layers)
    found = abstract_layers(layers, None)
    wanted = {f"params/{path}": leaf for layer in found for path, leaf in layer.params.items()}
    wanted |= {f"state/{path}": leaf for layer in found for path, leaf in layer.state.items()}
    record = base_of(metadata)
    left_out = {} if record is None else {key: leaf for key, leaf in wanted.items() if _is_left_out(key, saved)}
    held = {key: leaf for key, leaf in wanted.items() if key not in left_out}
    check_weights(step, held, saved, reader.directory)
    _check_tied(tied, wanted)
    values = _read(reader, step, held, device)
    groups = with_adapters(tuple(map(tuple, tied)), values)
    if record is not None:
        shapes = {key.removeprefix("params/"): leaf for key, leaf in left_out.items()}
        values |= base_values(record, found, shapes, (*groups, *shared_groups_of(found)), base, device)
    elif base is not None:
        raise ArgumentError(f"`base` is for checkpoints that hold only what was trained. Step {step} holds all.")
    seed = metadata.get("seed")
    return modules_with(
        found,
        values,
        (*groups, *shared_groups_of(found)),
        seed=seed if isinstance(seed, int) and 0 <= seed < 2**32 else 0,
        device=device,
        train=train,
    )


def _is_left_out(key: str, saved: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of what was trained does not hold a leaf. Adapters are always trained."""
    return key.startswith("params/") and key not in saved and not key.endswith(FACTORS)


def _weights(step: int, saved: Mapping[str, Mapping[str, Any]]) -> dict[str, jax.ShapeDtypeStruct]:
    weights = {key: leaf for key, leaf in saved.items() if key.startswith(WEIGHTS)}
    for key, leaf in weights.items():
        if jax.dtypes.canonicalize_dtype(leaf["dtype"]) != leaf["dtype"]:
            raise CheckpointError(
                f"A leaf must be loaded with its saved dtype. {key} of step {step} is {leaf['dtype']}, which JAX "
                "shortens. Enable jax_enable_x64, as it was when it was saved."
            )
    return {key: jax.ShapeDtypeStruct(leaf["shape"], jnp.dtype(leaf["dtype"])) for key, leaf in weights.items()}


def _read(
    reader: CheckpointReader, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], device: jax.Device
) -> Leaves:
    """The leaves by path, without the section that they were saved in."""
    tree: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for key, leaf in wanted.items():
        section, _, path = key.partition("/")
        shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device))
        tree.setdefault(section, {})[path] = shape
    (found,) = restore_step(reader, step, [tree])
    return {path: leaf for section in found.values() for path, leaf in section.items()}


def _check_tied(tied: Sequence[Sequence[str]], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    for group in tied:
        for path in group:
            if f"params/{path}" not in wanted:
                raise ArgumentError(f"`tied` must name parameters of the layers. Got {path!r}, which is none.")
            if wanted[f"params/{path}"].shape != wanted[f"params/{group[0]}"].shape:
                raise ArgumentError(
                    f"Tied parameters must have one shape. Got {group[0]!r} and {path!r}, which differ."
                )
