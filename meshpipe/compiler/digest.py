"""Hashes of values that can be compared between processes: equal only for the same code and values.

`fingerprint` compares objects within one process, by identity if their content is inaccessible.
"""

import dataclasses
import functools
import hashlib
import re
import sys
import sysconfig
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

_PLAIN = (bool, int, complex, str, bytes, type(None), type(Ellipsis), np.dtype, jax.sharding.PartitionSpec)
_SHARED_AT_WILL = (*_PLAIN, float, tuple, frozenset)
"""Types whose equal values may or may not be the same object, at Python's discretion."""
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib")})
ADDRESS = re.compile(r"0x[0-9a-f]+")

Parts: TypeAlias = tuple[str | bytes, Sequence[Any]]


def digest(value: Any) -> str:
    """A short hash of a value. It covers the content of plain values and containers; the code of functions and classes,
    with captured values and the functions and classes that they name; and the type of other objects, with their
    attributes if the class is the user's. Code of installed packages is identified by name and version.
    """
    hashed = hashlib.sha256()
    seen: dict[int, tuple[int, Any]] = {}
    """By id, the position at which a value was first visited; values are kept alive so that no id is reused."""
    waiting = [value]
    text: str | bytes
    inside: Sequence[Any]
    while waiting:
        value = waiting.pop()
        if id(value) in seen and not isinstance(value, _SHARED_AT_WILL):
            text, inside = f"seen {seen[id(value)][0]}", ()
        else:
            seen[id(value)] = len(seen), value
            text, inside = _parts(value)
        hashed.update(text.encode() if isinstance(text, str) else text)
        hashed.update(f" {len(inside)}\0".encode())
        waiting.extend(reversed(inside))
    return hashed.hexdigest()[:16]


def digest_of_text(text: str) -> str:
    """A short hash of a printed program that ignores addresses of objects."""
    return hashlib.sha256(ADDRESS.sub("", text).encode()).hexdigest()[:16]


def _parts(value: Any) -> Parts:
    """A description of the value itself, and the values inside it."""
    kind = type(value)
    if kind is float:
        return f"float {value.hex()}", ()
    if kind in _PLAIN:
        return f"{kind.__name__} {value!r}", ()
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}", ()
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _of_array(value), ()
    if isinstance(value, type):
        return _of_class(value)
    if isinstance(value, types.CodeType):
        names = (value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
        return value.co_code, (*names, value.co_consts)
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    return f"object {kind.__qualname__}", _inside(value)


def _inside(value: Any) -> Sequence[Any]:
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, Mapping):
        items = [(digest(key), item) for key, item in value.items()]
        return [part for item in sorted(items, key=lambda pair: pair[0]) for part in item]
    if isinstance(value, set | frozenset):
        return sorted(map(digest, value))
    if isinstance(value, tuple | list):
        return value
    if hasattr(value, "__wrapped__"):  # jax.jit, functools.lru_cache and their like
        return (value.__wrapped__,)
    if dataclasses.is_dataclass(value):
        return type(value), *((field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value))
    if _library(type(value)) is not None:
        return ()
    return type(value), getattr(value, "__dict__", {})


def _of_class(value: type) -> Parts:
    library = _library(value)
    if library is not None:
        return f"class {library}.{value.__qualname__}", ()
    inside: list[Any] = list(value.__bases__)
    for name, member in sorted(vars(value).items()):
        function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
        if isinstance(function, types.FunctionType) or (_is_constant(member) and not name.startswith("__")):
            inside += [name, function]
    return f"class {value.__qualname__}", inside


def _of_function(value: types.FunctionType) -> Parts:
    cells = [_content(cell) for cell in value.__closure__ or ()]
    library = _library(value)
    if library is not None:  # captured values may still be the user's
        return f"function {library}.{value.__qualname__}", cells
    inside: list[Any] = [value.__code__, value.__defaults__, value.__kwdefaults__, *cells]
    if hasattr(value, "__wrapped__"):
        inside.append(value.__wrapped__)
    for name in sorted(_names(value.__code__)):
        named = value.__globals__.get(name)
        if isinstance(named, types.FunctionType | type | functools.partial) or _is_constant(named):
            inside += [name, named]
    return f"function {value.__qualname__}", inside


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return ...


def _of_array(value: Any) -> bytes:
    head = f"array {value.dtype} {value.shape} ".encode()
    if isinstance(value, jax.Array):
        if isinstance(value, jax.core.Tracer) or not value.is_fully_addressable:
            return head
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
    array = np.asarray(value)
    return head + (repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())


def _names(code: types.CodeType) -> set[str]:
    """The names that code looks up, including those in nested functions."""
    inside = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inside))


def _is_constant(value: Any) -> bool:
    """Whether a global or class attribute counts as part of the code. Integers do not: they are often counters, or the
    process index.
    """
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, float | complex | str)


def _library(value: Any) -> str | None:
    """Module and version of the installed package, or standard library module, that defines a value; else None."""
    name = getattr(value, "__module__", None) or "builtins"
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names and top != "__main__":
        return name
    module = sys.modules.get(top)
    file = getattr(module, "__file__", None)
    if file is None or not str(file).startswith(_INSTALLED):
        return None
    return f"{name} {getattr(module, '__version__', '')}"
