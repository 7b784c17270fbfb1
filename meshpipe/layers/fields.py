"""Which fields of the batch a layer's call is given beside its input."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from meshpipe.layers.modes import KEYWORDS

RNGS = "rngs"
"""The keyword of a call that draws random numbers from a stream that it is given."""


@dataclass(frozen=True)
class WithFields:
    """A layer together with the batch fields that its call is to be given, by keyword."""

    layer: Any
    fields: Mapping[str, str]


def with_fields(layer: Any, /, **fields: str) -> WithFields:
    """A layer whose `__call__` gets exactly these batch fields: `with_fields(nnx.BatchNorm(8, rngs=rngs), mask="keep")`
    calls it with `mask=batch["keep"]`, and `with_fields(Block)` gives it none.

    `layer` is a module or its constructor, as everywhere in the list of layers.
    """
    return WithFields(layer, fields)


def parameters_of(kind: type) -> list[inspect.Parameter]:
    """What a module's call can be given by keyword after its input."""
    parameters = list(inspect.signature(kind.__call__).parameters.values())[2:]
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def fields_of(
    path: str, module: nnx.Module, batch_fields: Sequence[str], asked: Mapping[str, str] | None
) -> dict[str, str]:
    """The batch fields that a layer's call is given, by keyword.

    `asked` has them where `with_fields` does. Else a call that the user wrote gets every field that one of its
    parameters is named after; a call that Flax wrote gets none, since its names mean something of Flax's own. Raises
    `ValueError` when a parameter without a default is left over, or what was asked for is not there.
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
    """Of the fields that a call is given because of their names, those without which it would do something else."""
    optional = {p.name for p in parameters_of(type(module)) if p.default is not p.empty}
    return tuple(name for name in fields if name in optional)


def is_given_rngs(module: nnx.Module, fields: Mapping[str, str], *, has_streams: bool) -> bool:
    """Whether a call is given a random stream: where it asks for `rngs`, unless that may be left out and the module has
    streams of its own.
    """
    asking = [p for p in parameters_of(type(module)) if p.name == RNGS and RNGS not in fields]
    return any(p.default is p.empty or not has_streams for p in asking)


def is_of_flax(kind: type) -> bool:
    """Whether a module's call is one that Flax wrote."""
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
