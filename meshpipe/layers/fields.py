"""How a layer is called: by which function, and with which batch fields besides its input."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx

from meshpipe.errors import ArgumentError, kind_of
from meshpipe.layers.modes import KEYWORDS

RNGS = "rngs"
"""The keyword by which a call asks for a random stream."""


@dataclass(frozen=True)
class LayerCall:
    """A layer, and how it is called."""

    layer: Any
    fields: Mapping[str, str] | None = None
    """The batch fields that the call gets, by keyword; None passes fields by the names of its parameters."""
    function: Callable[..., Any] | None = None
    """`function(module, x)` calls the module; None is the module's own call."""


def with_fields(layer: Any, /, **fields: str) -> LayerCall:
    """A layer whose `__call__` gets exactly these batch fields, by keyword.

    `with_fields(nnx.BatchNorm(8, rngs=rngs), mask="keep")` calls the layer with `mask=batch["keep"]`;
    `with_fields(Block)` calls it with its input alone.

    Arguments:
        layer: A module or its constructor.
        **fields: The batch field for each keyword of the call.
    """
    return replace(layer, fields=fields) if isinstance(layer, LayerCall) else LayerCall(layer, fields)


def call(layer: Any, function: Callable[..., Any], /) -> LayerCall:
    """A layer that is called by `function(module, x)`, in place of the module's own call.

    `call(nnx.BatchNorm(8, rngs=rngs), lambda norm, x: norm(x.reshape(-1, 8)).reshape(x.shape))` needs no class around
    the module. The paths of its leaves are those of the module alone. Further parameters of the function get the batch
    fields of their name, as those of a call that you wrote; `train`, `training`, `deterministic` and
    `use_running_average` get the mode, and `rngs` a random stream.

    Arguments:
        layer: A module or its constructor.
        function: Returns the output of the layer for a module and the output of the layer before.
    """
    if not callable(function) or not _takes_two(function):
        raise ArgumentError(
            f"`function` must be a function of the module and its input. Got {kind_of(function)}. Write e.g. "
            "call(layer, lambda module, x: module(x))."
        )
    if isinstance(layer, LayerCall):
        return replace(layer, function=function)
    return LayerCall(layer, function=function)


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind_partial(None, None)
    except (TypeError, ValueError):
        return False
    return True


def call_of(module: nnx.Module, function: Callable[..., Any] | None) -> Callable[..., Any]:
    """What is called with the module and its input."""
    return type(module).__call__ if function is None else function


def parameters_of(called: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a call, after the module and its input, that can be passed by keyword."""
    parameters = list(inspect.signature(called).parameters.values())[2:]
    return [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def fields_of(
    path: str,
    module: nnx.Module,
    called: Callable[..., Any],
    batch_fields: Sequence[str],
    asked: Mapping[str, str] | None,
) -> dict[str, str]:
    """The batch fields that a layer's call gets, by keyword.

    `asked` has those of `with_fields`. Without it, a call that the user wrote gets every field whose name one of its
    parameters has. A call that Flax wrote gets none, since its parameters have meanings of their own. Raises
    `ValueError` when a parameter without a default remains, or a field that was asked for does not exist.
    """
    kind = type(module)
    parameters = parameters_of(called)
    if asked is not None:
        _check_asked(f"{path} ({kind.__name__})", called, batch_fields, asked)
        found = dict(asked)
    elif is_of_flax(called):
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


def optional_fields(called: Callable[..., Any], fields: Mapping[str, str]) -> tuple[str, ...]:
    """The fields that a call gets by name although the parameter has a default."""
    optional = {p.name for p in parameters_of(called) if p.default is not p.empty}
    return tuple(name for name in fields if name in optional)


def is_given_rngs(called: Callable[..., Any], fields: Mapping[str, str], *, has_streams: bool) -> bool:
    """Whether a call gets a random stream: if it has a parameter `rngs`, unless that has a default and the module has
    streams of its own.
    """
    asking = [p for p in parameters_of(called) if p.name == RNGS and RNGS not in fields]
    return any(p.default is p.empty or not has_streams for p in asking)


def is_of_flax(called: Callable[..., Any]) -> bool:
    """Whether a call is Flax's own."""
    module = getattr(called, "__module__", None) or ""  # code that exec made has none
    return module.split(".")[0] == "flax"


def _check_asked(layer: str, called: Callable[..., Any], batch_fields: Sequence[str], asked: Mapping[str, str]) -> None:
    signature = inspect.signature(called).parameters.values()
    names = {p.name for p in parameters_of(called)}
    for keyword, field in asked.items():
        if field not in batch_fields:
            raise ValueError(
                f"with_fields must name fields of the batch. Got {field!r} for {layer}; the batch has "
                f"{', '.join(batch_fields)}."
            )
        if keyword not in names and not any(p.kind is p.VAR_KEYWORD for p in signature):
            raise ValueError(
                f"with_fields must name parameters of the layer's __call__ after its input. Got {keyword!r} for "
                f"{layer}, which takes {', '.join(sorted(names)) or 'none'}."
            )
