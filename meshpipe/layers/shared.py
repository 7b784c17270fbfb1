"""Finds, by identity, the variables that several layers hold: ready-made modules, or what constructors capture, may."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from flax import nnx

from meshpipe.layers.paths import join

Variables = Mapping[str, nnx.Variable[Any]]
"""Those of one layer by leaf path."""
Groups = tuple[tuple[str, ...], ...]

FACTORS = ("lora/lora_a", "lora/lora_b")
"""Where below a module the factors of its adapter are."""
KERNELS = ("kernel", "embedding")
"""What an adapter may be of."""


def variables_of(path: str, module: nnx.Module) -> dict[str, nnx.Variable[Any]]:
    """A module's own variables, not copies, by leaf path; random streams draw by their path, so those are left out."""
    flat = nnx.to_flat_state(nnx.state(module, graph=True))
    return {join(path, key): v for key, v in flat if isinstance(v, nnx.Variable) and not isinstance(v, nnx.RngState)}


def shared_groups(layers: Sequence[Variables]) -> Groups:
    """The paths of every variable that more than one layer holds, in the order of the layers."""
    paths: dict[int, list[str]] = {}
    for layer in layers:
        for path, variable in layer.items():
            paths.setdefault(id(variable), []).append(path)
    return tuple(tuple(group) for group in paths.values() if len(group) > 1)


def with_adapters(groups: Groups, leaves: Container[str]) -> Groups:
    """The groups, and those of the adapters of tied kernels (`meshpipe.lora`): one kernel has one adapter."""
    found = []
    for group in groups:
        parents = [path.rpartition("/") for path in group]
        if all(name in KERNELS for _, _, name in parents):
            of_adapters = [tuple(f"{parent}/{factor}" for parent, _, _ in parents) for factor in FACTORS]
            found += [paths for paths in of_adapters if all(path in leaves for path in paths)]
    return (*groups, *(group for group in found if group not in groups))


def merge_groups(named: Sequence[Sequence[str]], found: Groups) -> Groups:
    """The groups that the user named and those that were found; overlapping groups are merged."""
    groups = [list(group) for group in named]
    for group in found:
        touched = [other for other in groups if set(other).intersection(group)]
        if not touched:
            groups.append(list(group))
            continue
        first, *rest = touched
        for path in (*(path for other in rest for path in other), *group):
            if path not in first:
                first.append(path)
        groups = [other for other in groups if all(other is not one for one in rest)]
    return tuple(map(tuple, groups))
