"""The user's modules with the values of training: made anew, or written into modules that were given."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from meshpipe.errors import ArgumentError, kind_of
from meshpipe.layers.fields import LayerCall
from meshpipe.layers.layer import Layer, Leaves, Randomness
from meshpipe.layers.paths import join
from meshpipe.layers.shared import FACTORS
from meshpipe.sharding import local_value, replicated


def host_device() -> jax.Device:
    """The CPU device that stands for the host's memory. Raises `ArgumentError` where JAX was told to have none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise ArgumentError(
            "Values go to the host unless a `device` is given, and JAX was started without its CPU backend. "
            "Pass `device`, or add ,cpu to the environment variable JAX_PLATFORMS."
        ) from None


def on_device(leaf: jax.Array, device: jax.Device) -> jax.Array:
    """A copy of a leaf on one device of this process; every process with a part of the leaf calls it."""
    if not leaf.is_fully_addressable:
        assert isinstance(leaf.sharding, jax.sharding.NamedSharding)
        everywhere = replicated(leaf.sharding.mesh)  # type: ignore[arg-type]
        leaf = jnp.asarray(local_value(jax.jit(lambda array: array, out_shardings=everywhere)(leaf)))
    # Without the copy, the array of a module could be one that the next step donates; `may_alias=False` does not help.
    return jnp.copy(jax.device_put(leaf, device))


def modules_with(
    layers: Sequence[Layer],
    values: Mapping[str, jax.Array],
    groups: Sequence[Sequence[str]],
    *,
    seed: int,
    device: jax.Device,
    train: bool,
) -> list[nnx.Module]:
    """The module of every layer with these values, in evaluation or training mode.

    Leaves of one of the `groups` become one variable. Random streams begin from the seed and the path of the layer.
    """
    zero = jnp.uint32(0)
    randomness = Randomness(jax.random.key_data(jax.random.key(seed)), zero, zero)
    structures = {
        join(layer.path, key): variable for layer in layers for key, variable in nnx.to_flat_state(layer.structure)
    }
    pool: dict[str, nnx.Variable[Any]] = {}
    for group in groups:
        held = [path for path in group if path in structures and path not in pool]
        pool |= dict.fromkeys(held, structures[held[0]].replace(values[held[0]])) if held else {}
    made = [layer.module(values, randomness, train, pool) for layer in layers]
    for module in made:
        streams = nnx.state(module, nnx.RngState, graph=True)
        nnx.update(module, jax.device_put(streams, device))
    return made


def write(layers: Sequence[Layer], given: Any, values: Mapping[str, jax.Array]) -> None:
    """Writes values into the variables of modules, each onto the devices where the variable is now.

    `given` has an entry for every layer. Layers without values here are passed over. Raises `ArgumentError`, before
    anything is written, when a module is not that of its layer.
    """
    if isinstance(given, str) or not isinstance(given, Sequence | nnx.List) or len(given) != len(layers):
        got = f"{len(given)}" if isinstance(given, Sequence | nnx.List) else kind_of(given)
        raise ArgumentError(f"`layers` must be a list of the {len(layers)} layers of the trainer. Got {got}.")
    entries = [entry.layer if isinstance(entry, LayerCall) else entry for entry in given]
    updates = [_update(layer, entry, values) for layer, entry in zip(layers, entries, strict=True)]
    for update in updates:
        if update is not None:
            nnx.update(*update)


def write_merged(layers: Sequence[Layer], given: Any, modules: Sequence[nnx.Module | None]) -> None:
    """As `write`, with the values of modules without the adapters of their layers; None for layers of others."""
    values: dict[str, jax.Array] = {}
    without: list[Layer] = []
    for layer, module in zip(layers, modules, strict=True):
        if module is None:
            without.append(layer)
            continue
        flat = nnx.to_flat_state(nnx.state(module, graph=True))
        found = {join(layer.path, key): v for key, v in flat if not isinstance(v, nnx.RngState)}
        values |= {path: v.get_value() if isinstance(v, nnx.Variable) else v for path, v in found.items()}
        without.append(replace(layer, params={path: leaf for path, leaf in layer.params.items() if path in found}))
    write(without, given, values)


def _update(layer: Layer, module: Any, values: Mapping[str, jax.Array]) -> tuple[nnx.Module, nnx.State] | None:
    """The new state of a module, or None if there is nothing to write."""
    wanted = {**layer.params, **layer.state}
    if not wanted or not all(path in values for path in wanted):
        return None
    if not isinstance(module, nnx.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else kind_of(module)
        raise ArgumentError(
            f"Values can only be written into modules. {layer.path} is {got}. Pass the module that it "
            "makes, or take new ones from `Trainer.modules`."
        )
    flat = nnx.to_flat_state(nnx.state(module, graph=True))
    variables = {join(layer.path, key): (key, v) for key, v in flat if not isinstance(v, nnx.RngState)}
    for path in sorted(wanted.keys() ^ variables.keys()):
        where = "the trained layer" if path in wanted else "the module that was given"
        way_out = ""
        if path.endswith(FACTORS):
            way_out = " Pass `merged=True` to add it to its kernel." if path in wanted else " Pass modules without it."
        raise ArgumentError(f"A module must have the leaves of its layer. Only {where} has {path}.{way_out}")
    entries = []
    for path, (key, variable) in variables.items():
        held = variable.get_value() if isinstance(variable, nnx.Variable) else variable
        dtype = jax.dtypes.canonicalize_dtype(held.dtype)
        if (held.shape, dtype) != (wanted[path].shape, wanted[path].dtype):
            raise ArgumentError(
                f"A module must have the shapes and dtypes of its layer. {path} is {dtype}{list(held.shape)}, and "
                f"{wanted[path].dtype}{list(wanted[path].shape)} in the trained layer."
            )
        new = values[path]
        if isinstance(held, jax.Array) and held.is_fully_addressable:
            new = jax.device_put(new, held.sharding)
        entries.append((key, variable.replace(new) if isinstance(variable, nnx.Variable) else new))
    return module, nnx.from_flat_state(entries)


def shared_groups_of(layers: Sequence[Layer]) -> list[tuple[str, ...]]:
    """The leaves, parameters and other state, whose variable several layers hold, by variable."""
    return list(dict.fromkeys(group for layer in layers for group in layer.shared.values()))


def local_leaves(leaves: Leaves, device: jax.Device) -> Leaves:
    """Copies of leaves on one device, in the order in which all processes ask for them."""
    return {path: on_device(leaf, device) for path, leaf in leaves.items()}
