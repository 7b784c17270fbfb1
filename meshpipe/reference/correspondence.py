"""Which leaf of an uncut model a leaf of the layers is."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

Key = tuple[Any, ...]
"""Attributes and indices that lead to a leaf of a module."""


def correspond(
    model: nnx.Module,
    own: Mapping[Key, Any],
    layers: Sequence[Any],
    leaves: Mapping[str, Any],
    paths: Mapping[str, str],
    tied: Sequence[Sequence[str]],
) -> dict[str, tuple[Key, bool]]:
    """For every leaf path of the layers the key of its leaf in the model, and whether they are one and the same object.

    `own` are the model's variables by key, `leaves` the layers' arrays or shapes by leaf path. A leaf is found by
    `paths`, else by identity, else as the first leaf of its shape whose path ends most alike, in the order in which the
    model's attributes were set. Raises `ValueError` for a leaf that is not found so.
    """
    keys = sorted(own, key=_order(model))
    given = _given(keys, leaves, paths)
    identical = {p: k for p, k in _identical(model, own, layers, leaves).items() if p not in given}
    found = {**{p: (k, False) for p, k in given.items()}, **{p: (k, True) for p, k in identical.items()}}
    owners = {path: group[0] for group in tied for path in group[1:]}
    for path, leaf in leaves.items():
        if path not in found and path not in owners:
            taken = {key for key, _ in found.values()}
            free = [key for key in keys if key not in taken and _alike(own[key], leaf)]
            found[path] = _most_alike(path, leaf, free), False
    for path, owner in owners.items():
        if path not in found and owner in found:
            found[path] = found[owner][0], False
    for path, (key, _) in found.items():
        _check_shape(path, leaves[path], key, own[key])
    return found


def text(key: Key) -> str:
    return "/".join(map(str, key))


def _given(keys: Sequence[Key], leaves: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Key]:
    by_text = {text(key): key for key in keys}
    for start in paths:
        if not any(_below(path, start) for path in leaves):
            raise ValueError(
                f"`paths` of a reference must name leaves of layers, or what leads to them. Got {start!r}; leaves are "
                f"{_some(leaves)}."
            )
    found = {}
    for path in leaves:
        starts = [start for start in paths if _below(path, start)]
        if starts:
            start = max(starts, key=len)
            place = (paths[start] + path.removeprefix(start)).strip("/")
            if place not in by_text:
                raise ValueError(
                    f"`paths` of a reference must lead to leaves of its model. Got {start!r}: {paths[start]!r}, which "
                    f"takes {path} to {place!r}; the model has {_some(by_text)}."
                )
            found[path] = by_text[place]
    return found


def _identical(
    model: nnx.Module, own: Mapping[Key, Any], layers: Sequence[Any], leaves: Mapping[str, Any]
) -> dict[str, Key]:
    """By leaf path, the keys of variables that layers and model share."""
    key_of = {id(leaf): key for key, leaf in _variables(model).items() if key in own}
    found = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, nnx.Module):
            paths = [path for path in leaves if _below(path, f"layers/{index}")]
            found.update({p: key_of[id(v)] for p, v in _paths_of(index, layer, paths).items() if id(v) in key_of})
    return found


def _paths_of(index: int, layer: nnx.Module, paths: Sequence[str]) -> dict[str, Any]:
    """The variables of a ready-made layer by their leaf paths, else in the order of leaves: parameters first."""
    variables = _variables(layer)
    named = {f"layers/{index}/{text(key)}": variable for key, variable in variables.items()}
    if set(paths) <= set(named) and len(named) == len(variables):  # adapters are not looked for
        return {path: named[path] for path in paths}
    ordered = sorted(variables.values(), key=lambda variable: not trains(variable))
    return dict(zip(paths, ordered, strict=True))


def trains(variable: Any) -> bool:
    return isinstance(variable, nnx.Param) and bool(jnp.issubdtype(variable.dtype, jnp.inexact))


def _variables(module: nnx.Module) -> dict[Key, Any]:
    """Variables by key without the state of random streams; one that stands in several places under the first."""
    keys = [k for k, v in nnx.to_flat_state(nnx.state(module)) if not isinstance(v, nnx.RngState)]
    found = {tuple(key): leaf for key, leaf in nnx.iter_graph(module)}
    return {key: found[key] for key in keys}


def _order(model: nnx.Module) -> Any:
    """Sorts keys as the attributes of the model were set."""
    nodes = {tuple(key): node for key, node in nnx.iter_graph(model)}

    def place(key: Key) -> tuple[int, ...]:
        places = []
        for depth, name in enumerate(key):
            node = nodes.get(key[:depth])
            names = list(vars(node)) if hasattr(node, "__dict__") else []
            places.append(name if isinstance(name, int) else names.index(name) if name in names else 0)
        return tuple(places)

    return place


def _most_alike(path: str, leaf: Any, free: Sequence[Key]) -> Key:
    names = path.split("/")

    def common(key: Key) -> int:
        ends = zip(reversed(names), map(str, reversed(key)), strict=False)
        return next((n for n, (a, b) in enumerate(ends) if a != b), min(len(names), len(key)))

    best = max(free, key=common, default=None)
    if best is None or common(best) == 0:
        raise ValueError(
            f"Every leaf of the layers must be one of the reference. {path} {list(leaf.shape)} {leaf.dtype} is not: "
            f"no leaf of that shape and name is left, only {_some(text(k) for k in free)}. Say where it is by "
            f"meshpipe.Reference(model, paths={{{path!r}: ...}}); if it is the same parameter as another leaf, tie "
            "them by tied=[(path, path)]; if it is of an adapter of meshpipe.lora, give the Reference an adapter_scale."
        )
    return best


def _alike(variable: Any, leaf: Any) -> bool:
    return np.shape(variable) == tuple(leaf.shape) and variable.dtype == leaf.dtype


def _check_shape(path: str, leaf: Any, key: Key, variable: Any) -> None:
    if not _alike(variable, leaf):
        raise ValueError(
            f"A leaf of the layers must have the shape and dtype that it has in the reference. {path} is "
            f"{list(leaf.shape)} {leaf.dtype}, {text(key)} is {list(np.shape(variable))} {variable.dtype}."
        )


def _below(path: str, start: str) -> bool:
    return path == start or path.startswith(start.rstrip("/") + "/")


def _some(paths: Any) -> str:
    names = list(paths)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") or "none"
