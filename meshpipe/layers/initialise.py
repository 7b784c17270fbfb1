"""Creates the leaves of layers on the devices of their stage, already sharded."""

from collections.abc import Container, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from meshpipe.compiler.compiler import Compiler
from meshpipe.compiler.fingerprint import fingerprint
from meshpipe.layers.layer import Layer, Leaves, path_hash
from meshpipe.sharding import ShardingRules, abstract, replicated
from meshpipe.stage.target import Target

Placed = dict[str, jax.ShapeDtypeStruct]


def placed(layer: Layer, mesh: Mesh, rules: ShardingRules) -> tuple[Placed, Placed]:
    """Shapes of the layer's parameters and state with their shardings on the submesh.

    Raises `ValueError` when a logical axis has no rule or does not divide by its mesh axis.
    """

    def place(leaves: Any) -> Placed:
        return {
            path: abstract(leaf.shape, leaf.dtype, rules.sharding(path, leaf.shape, layer.axes.get(path), mesh))
            for path, leaf in leaves.items()
        }

    return place(layer.params), place(layer.state)


def initialise(
    layers: Sequence[tuple[Layer, Mesh]],
    rules: ShardingRules,
    seed: int,
    target: Target,
    compiler: Compiler | None = None,
    skip: Container[str] = (),
) -> list[tuple[Leaves, Leaves]]:
    """Parameters and state of every layer on its submesh, but for the leaves to `skip`, which are never allocated.

    The values that a constructor draws depend only on `seed` and the path of the layer. Those of a ready-made module
    are copied. Layers that differ only in their path share one program. It runs on the submesh of the first such layer,
    and the values are then moved to their own submesh: loading the program there would take longer than drawing them.
    """
    programs = _programs(layers, rules, target, compiler or Compiler(), skip)
    results: list[tuple[Leaves, Leaves]] = []
    for (layer, mesh), found in zip(layers, programs, strict=True):
        params, state = (_without(leaves, skip) for leaves in placed(layer, mesh, rules))
        if found is None:
            values = layer.values or {}
            results.append((_copy(values, params), _copy(values, state)))
            continue
        program, where = found
        arguments = jax.device_put(
            (jax.random.key_data(jax.random.key(seed)), jnp.uint32(path_hash(layer.path))), replicated(where)
        )
        flat = program(*arguments)
        if where != mesh:
            shardings = tuple(leaf.sharding for leaf in (*params.values(), *state.values()))
            flat = jax.block_until_ready(jax.device_put(flat, shardings))
        results.append((dict(zip(params, flat, strict=False)), dict(zip(state, flat[len(params) :], strict=True))))
    return results


def _programs(
    layers: Sequence[tuple[Layer, Mesh]],
    rules: ShardingRules,
    target: Target,
    compiler: Compiler,
    skip: Container[str],
) -> list[tuple[Any, Mesh] | None]:
    """For every layer with a constructor, the program that runs it, and its submesh; None for ready-made layers, and
    for those all of whose leaves are skipped.
    """
    lowered: dict[Hashable, tuple[jax.stages.Lowered, Mesh]] = {}
    kinds: list[Hashable] = []
    for layer, mesh in layers:
        # Nothing is moved to or from a submesh that other processes have a part of.
        place = mesh.devices.shape if _is_own(mesh) else mesh
        leaves = tuple(_without(layer.params, skip)) + tuple(_without(layer.state, skip))
        if layer.values is not None or (not leaves and (layer.params or layer.state)):
            kinds.append(None)
            continue
        kept = tuple(path.removeprefix(layer.path) for path in leaves)
        kinds.append((layer.kind, fingerprint(layer.make), place, kept))
        if kinds[-1] not in lowered:
            lowered[kinds[-1]] = _lower(layer, mesh, rules, skip), mesh
    with ThreadPoolExecutor() as pool:
        options = target.initialise_options
        compiled = pool.map(lambda first: compiler.compile(first[0], first[1], options), lowered.values())
        programs = {kind: (program, lowered[kind][1]) for kind, program in zip(lowered, compiled, strict=True)}
    return [programs.get(kind) for kind in kinds]


def _is_own(mesh: Mesh) -> bool:
    return all(device.process_index == jax.process_index() for device in mesh.devices.flat)


def _without(leaves: Mapping[str, Any], skip: Container[str]) -> dict[str, Any]:
    return {path: leaf for path, leaf in leaves.items() if path not in skip}


def _lower(layer: Layer, mesh: Mesh, rules: ShardingRules, skip: Container[str]) -> jax.stages.Lowered:
    params, state = (_without(leaves, skip) for leaves in placed(layer, mesh, rules))

    def build(seed: jax.Array, hashed: jax.Array) -> tuple[jax.Array, ...]:
        made_params, made_state = layer.initialise(jax.random.wrap_key_data(seed), hashed)
        return (*(made_params[path] for path in params), *(made_state[path] for path in state))

    shardings = tuple(leaf.sharding for leaf in (*params.values(), *state.values()))
    everywhere: NamedSharding = replicated(mesh)
    seed = abstract(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape, jnp.uint32, everywhere)
    with jax.set_mesh(mesh):
        return jax.jit(build, out_shardings=shardings).lower(seed, abstract((), jnp.uint32, everywhere))


def _copy(values: Leaves, shapes: Placed) -> Leaves:
    """Copies the values, so that donating them later does not destroy the user's module."""
    return {path: jnp.copy(jax.device_put(values[path], shape.sharding)) for path, shape in shapes.items()}
