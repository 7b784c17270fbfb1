"""Decides before tracing whether two values lead to the same program: by exact type and content, or by identity."""

import dataclasses
import functools
import types
from collections.abc import Hashable, Mapping
from typing import Any

import jax
import numpy as np

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), np.dtype, jax.sharding.PartitionSpec)

_BUILT_IN = (int, float, complex, str, bytes, tuple, list, dict, set, frozenset, np.ndarray)


def fingerprint(value: Any) -> Hashable:
    """A hashable value, equal for two values only if no pure function can distinguish them.

    Numbers (1, 1.0 and True differ, and so do 0.0 and -0.0), strings, containers, dataclasses, and functions with their
    captured values are compared by content; everything else by identity.
    """
    return _of(value, ())


@dataclasses.dataclass(frozen=True)
class _Object:
    """Represents one object by identity, and keeps it alive so that its id is not reused."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Object) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _of(value: Any, parents: tuple[int, ...]) -> Hashable:
    kind = type(value)
    if kind in _PLAIN:
        return kind, repr(value)
    if id(value) in parents:  # a function that refers to itself
        return _Object(value)
    inside = (*parents, id(value))
    if kind in (tuple, list) or (issubclass(kind, tuple) and hasattr(kind, "_fields")):
        return kind, tuple(_of(item, inside) for item in value)
    if kind is dict or (isinstance(value, Mapping) and kind.__module__.startswith("flax.")):
        return kind, tuple((_of(key, inside), _of(item, inside)) for key, item in value.items())
    if (kind is np.ndarray or isinstance(value, np.generic)) and not value.dtype.hasobject:
        return kind, str(value.dtype), value.shape, value.tobytes()
    if kind is jax.tree_util.PyTreeDef:
        return kind, value, repr(value)
    if kind is functools.partial:
        return kind, *(_of(part, inside) for part in (value.func, value.args, value.keywords, vars(value)))
    if kind is types.MethodType:
        return kind, _of(value.__func__, inside), _of(value.__self__, inside)
    if kind is types.FunctionType:
        return kind, *(_of(part, inside) for part in _parts(value)), value.__code__, _Object(value.__globals__)
    names = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(kind) else None
    if names is not None and getattr(value, "__dict__", {}).keys() <= names and not isinstance(value, _BUILT_IN):
        return kind, tuple((name, _of(getattr(value, name, None), inside)) for name in sorted(names))
    return _Object(value)


def _parts(function: types.FunctionType) -> tuple[Any, ...]:
    captured = tuple(_captured(cell) for cell in function.__closure__ or ())
    return function.__defaults__, function.__kwdefaults__, captured, vars(function)


def _captured(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _Object(cell)
