"""Switches modules between training and evaluation by attributes and keywords, and keeps what a module has pinned."""

from collections.abc import Iterable, Iterator
from inspect import Parameter
from typing import Any

import numpy as np
from flax import nnx

ATTRIBUTES = ("deterministic", "use_running_average")
"""The attributes that `nnx.Module.train` and `eval` set in a module and all its parts."""


def mode_values(train: bool) -> dict[str, bool]:
    """Values of the keywords that tell a call whether it is training."""
    return {"train": train, "training": train, **dict.fromkeys(ATTRIBUTES, not train)}


KEYWORDS = frozenset(mode_values(True))

_NONE = object()
"""Stands for an attribute that is not there."""


def set_mode(module: nnx.Module, train: bool) -> None:
    """As `module.train()` or `module.eval()`, but what is True stays: a module pinned that in its constructor.

    A module with a method of its own under that name has that called.
    """
    kept = [(node, name) for _, node, name in _fixed(module)]
    method = "train" if train else "eval"
    if getattr(type(module), method) is not getattr(nnx.Module, method):
        getattr(type(module), method)(module)
    for _, node in nnx.iter_modules(module, graph=True):
        for name in ATTRIBUTES:
            value = _attribute(node, name)
            if value is None or value is False:
                setattr(node, name, not train)
    for node, name in kept:
        setattr(node, name, True)


def pinned(module: nnx.Module) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The parts of a module that are pinned to evaluation mode: path of the part, and the attribute that is True
    there.
    """
    return ((path, name) for path, _, name in _fixed(module))


def _fixed(module: nnx.Module) -> Iterator[tuple[tuple[Any, ...], nnx.Module, str]]:
    for path, node in nnx.iter_modules(module, graph=True):
        for name in ATTRIBUTES:
            if _attribute(node, name) is True:
                yield path, node, name


def mode_keywords(module: nnx.Module, parameters: Iterable[Parameter]) -> tuple[str, ...]:
    """Which of a call's keywords the mode fills in.

    A keyword that is None by default is not, where modules hold an attribute of that name: then None means that each
    of them decides.
    """
    return tuple(
        p.name for p in parameters if p.name in KEYWORDS and not (p.default is None and _is_attribute(module, p.name))
    )


def told(module: nnx.Module, keywords: Iterable[str], train: bool) -> dict[str, bool]:
    """Values for these keywords; what the module itself has pinned goes before the mode."""
    values = mode_values(train)
    return {name: values[name] or _attribute(module, name) is True for name in keywords}


def _is_attribute(module: nnx.Module, name: str) -> bool:
    return name in ATTRIBUTES and any(
        _attribute(node, name) is not _NONE for _, node in nnx.iter_modules(module, graph=True)
    )


def _attribute(node: nnx.Module, name: str) -> Any:
    """True, False or None as a module has it; anything else under such a name, a property say, is the user's own."""
    if name not in ATTRIBUTES or isinstance(getattr(type(node), name, None), property):
        return _NONE
    value = getattr(node, name, _NONE)
    if isinstance(value, np.bool_):
        return bool(value)
    return value if value is None or isinstance(value, bool) else _NONE
