"""Which batch fields a layer's call gets besides its input."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from meshpipe.layers.modes import KEYWORDS

RNGS = "rngs"
"""The keyword by which a call asks for a random stream."""


@dataclass(frozen=True)
class WithFields:
    """A layer, and the batch fields that its call gets, by keyword."""

    layer: Any
    fields: Mapping[str, str]


def with_fields(layer: Any, /, **fields: str) -> WithFields:
    """A layer whose `__call__` gets exactly these batch fields, by keyword.

    `with_fields(nnx.BatchNorm(8, rngs=rngs), mask="keep")` calls the layer with `mask=batch["keep"]`;
    `with_fields(Block)` calls it with its input alone.

    Arguments:
        layer: A module or its constructor.
        **fields: The batch field for each keyword of the call.
    """
    return WithFields(layer, fields)


def parameters_of(kind: type) -> list[inspect.Parameter]:
    """The parameters of a module's call, after its input, that can be passed by keyword."""
    parameters = list(inspect.signature(kind.__call__).parameters.values())[2:]
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def fields_of(
    path: str, module: nnx.Module, batch_fields: Sequence[str], asked: Mapping[str, str] | None
) -> dict[str, str]:
    """The batch fields that a layer's call gets, by keyword.

    `asked` has those of `with_fields`. Without it, a call that the user wrote gets every field whose name one of its
    parameters has. A call that Flax wrote gets none, since its parameters have meanings of their own. Raises
    `ValueError` when a parameter without a default remains, or a field that was asked for does not exist.
    """
    kind = type(module)
    parameters = parameters_of(kind)
    if asked is not None:
        _check_asked(path, kind, batch_fields, asked)
        found = dict(asked)
    elif is_of_flax(kind):
        found = {}
    else:
        found = {p.name: p.name for p in parameters if p.name in batch_fields}
    for p in parameters:
        if p.default is p.empty and p.name not in found and p.name not in KEYWORDS and p.name != RNGS:
            fields = ", ".join(batch_fields)
            way_out = "Add the field or give it a default."
            if p.name in batch_fields:
                way_out = f"Ask for the field: meshpipe.with_fields(layer, {p.name}={p.name!r})."
            raise ValueError(
                "After its input, a layer's __call__ may only require batch fields, `train` and `rngs`. "
                f"{path} ({kind.__name__}) requires {p.name!r}; the batch has {fields}. {way_out}"
            )
    return found


def optional_fields(module: nnx.Module, fields: Mapping[str, str]) -> tuple[str, ...]:
    """The fields that a call gets by name although the parameter has a default."""
    optional = {p.name for p in parameters_of(type(module)) if p.default is not p.empty}
    return tuple(name for name in fields if name in optional)


def is_given_rngs(module: nnx.Module, fields: Mapping[str, str], *, has_streams: bool) -> bool:
    """Whether a call gets a random stream: if it has a parameter `rngs`, unless that has a default and the module has
    streams of its own.
    """
    asking = [p for p in parameters_of(type(module)) if p.name == RNGS and RNGS not in fields]
    return any(p.default is p.empty or not has_streams for p in asking)


def is_of_flax(kind: type) -> bool:
    """Whether a module's call is Flax's own."""
    module = getattr(kind.__call__, "__module__", None) or ""  # code that exec made has none
    return module.split(".")[0] == "flax"


def _check_asked(path: str, kind: type, batch_fields: Sequence[str], asked: Mapping[str, str]) -> None:
    signature = inspect.signature(kind.__call__).parameters.values()
    names = {p.name for p in parameters_of(kind)}
    for keyword, field in asked.items():
        if field not in batch_fields:
            raise ValueError(
                f"with_fields must name fields of the batch. Got {field!r} for {path} ({kind.__name__}); the batch has "
                f"{', '.join(batch_fields)}."
            )
        if keyword not in names and not any(p.kind is p.VAR_KEYWORD for p in signature):
            raise ValueError(
                f"with_fields must name parameters of the layer's __call__ after its input. Got {keyword!r} for "
                f"{path} ({kind.__name__}), which takes {', '.join(sorted(names)) or 'none'}."
            )
