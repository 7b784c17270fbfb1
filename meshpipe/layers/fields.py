"""How a layer is called: by which function, with which input, and with which batch fields and named outputs besides."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from keyword import iskeyword
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
    """The batch fields and named outputs that the call gets, by keyword; None passes them by the names of its
    parameters."""
    function: Callable[..., Any] | None = None
    """`function(module, x)` calls the module; None is the module's own call."""
    name: str | None = None
    """The name by which later layers, the loss and the metrics get its output; None is without."""
    input: str | None = None
    """The batch field or named output that it is called with; None is the output of the layer before it."""
    sows: tuple[tuple[str, str], ...] = ()
    """Values that its call sows, to be had by name as its output is: the name, and the name under which it is sown."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its output and of what it sows."""
        return (*(() if self.name is None else (self.name,)), *(name for name, _ in self.sows))


def with_fields(layer: Any, /, **fields: str) -> LayerCall:
    """A layer whose `__call__` gets exactly these batch fields and named outputs, by keyword.

    `with_fields(nnx.BatchNorm(8, rngs=rngs), mask="keep")` calls the layer with `mask=batch["keep"]`;
    `with_fields(Block)` calls it with its input alone.

    Arguments:
        layer: A module or its constructor.
        **fields: The batch field, or the name of an earlier layer's output, for each keyword of the call.
    """
    return replace(_call_of(layer), fields=fields)


def named(name: str, layer: Any, /) -> LayerCall:
    """A layer whose output has a name.

    Every later layer whose call has a parameter of that name gets the output, as it gets a batch field, at whichever
    stage it lives; so do the loss and the metrics, by a third parameter. The next layer is called with it as usual. The
    output goes straight from the stage that makes it to those that read it, and its gradients straight back.

    Arguments:
        name: An identifier that is neither a batch field nor the name of another output.
        layer: A module, its constructor, or a function.

    Raises `ValueError` for a name that no parameter can have, and for a layer that has a name.
    """
    _check_name("named", "memory", name)
    found = _call_of(layer)
    if found.name is not None:
        raise ArgumentError(
            f"An output has one name. Got {name!r} for an output that is named {found.name!r}. Readers may call it as "
            f"they like: with_fields(layer, {name}={found.name!r})."
        )
    return replace(found, name=name)


def sows(layer: Any, /, *names: str, **renamed: str) -> LayerCall:
    """A layer of which values that its call sows as `nnx.Intermediate` can be read by name, as its output can.

    `sows(Block, "features")` gives later layers, the loss and the metrics that have a parameter `features` what the
    call sows under that name, at whichever stage they live; `sows(Block, router_3="router")` gives it another name.
    Gradients flow back. What the call sows several times is a tuple, in the order of the calls.

    Arguments:
        layer: A module or its constructor.
        *names: Names under which its call sows values.
        **renamed: Likewise, by the name that readers use.

    Raises `ValueError` for a name that no parameter can have, or that is given twice.
    """
    pairs = (*((name, name) for name in names), *renamed.items())
    if not pairs:
        raise ArgumentError("sows takes a layer, then names. Got no name. Write e.g. sows(layer, 'features').")
    found = _call_of(layer)
    for name, sown in pairs:
        _check_name("sows", "features", name)
        _check_name("sows", "features", sown)
    given = (*found.sows, *pairs)
    twice = [name for index, (name, _) in enumerate(given) if name in [other for other, _ in given[:index]]]
    if twice:
        raise ArgumentError(f"sows must name each value once. Got {twice[0]!r} twice. Leave one out, or rename it.")
    return replace(found, sows=given)


def reading(source: str, layer: Any, /) -> LayerCall:
    """A layer that is called with a batch field or a named output, in place of the output of the layer before it.

    `reading("targets", Embed)` begins a decoder, or a second tower. The layer after it is called with its output as
    usual. The output of the layer before it must be used elsewhere: give it a name.

    Arguments:
        source: A field of the batch, or the name of an earlier layer's output.
        layer: A module, its constructor, or a function.

    Raises `ValueError` for a layer that reads something else already.
    """
    _check_name("reading", "targets", source)
    found = _call_of(layer)
    if found.input is not None:
        raise ArgumentError(
            f"A layer is called with one input. Got reading({source!r}, ...) of a layer that reads {found.input!r}. "
            "For a second one, give its call a parameter of that name."
        )
    return replace(found, input=source)


def _call_of(layer: Any) -> LayerCall:
    return layer if isinstance(layer, LayerCall) else LayerCall(layer)


def _check_name(function: str, example: str, name: Any) -> None:
    order = ("a layer", "names") if function == "sows" else ("a name", "a layer")
    written = f"sows(layer, {example!r})" if function == "sows" else f"{function}({example!r}, layer)"
    if not isinstance(name, str):
        raise ArgumentError(
            f"{function} takes {order[0]}, then {order[1]}. Got {kind_of(name)} as the name. Write e.g. {written}."
        )
    if function == "reading":
        return
    if not name.isidentifier() or iskeyword(name):
        raise ArgumentError(
            f"The name of an output must be one that a parameter can have. Got {name!r}. Write e.g. {written}."
        )
    if name in KEYWORDS or name == RNGS:
        raise ArgumentError(
            f"An output must not be named {name!r}: by that parameter, calls ask for their mode or a random stream. "
            "Choose another name."
        )


def call(layer: Any, function: Callable[..., Any], /) -> LayerCall:
    """A layer that is called by `function(module, x)`, in place of the module's own call.

    `call(nnx.BatchNorm(8, rngs=rngs), lambda norm, x: norm(x.reshape(-1, 8)).reshape(x.shape))` needs no class around
    the module. The paths of its leaves are those of the module alone. Further parameters of the function get the batch
    fields and named outputs of their name, as those of a call that you wrote; `train`, `training`, `deterministic` and
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
    return replace(_call_of(layer), function=function)


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


@dataclass(frozen=True)
class Names:
    """What a layer may ask for by name: the fields of the batch, and named outputs."""

    fields: Sequence[str]
    outputs: Mapping[str, str]
    """The layer that makes each named output, in words."""
    later: Mapping[str, str]
    """Likewise for those that do not exist yet when the layer is called: its own, and those of layers after it."""

    def __contains__(self, name: str) -> bool:
        return name in self.fields or name in self.outputs

    def __str__(self) -> str:
        outputs = f", and the named outputs before it are {', '.join(self.outputs)}" if self.outputs else ""
        return f"the batch has {', '.join(self.fields)}{outputs}"


def check_exists(layer: str, name: str, names: Names, rule: str, way_out: str = "") -> None:
    """Raises `ValueError` unless a name that a layer asks for is known when it is called."""
    if name in names:
        return
    if name in names.later:
        raise ValueError(
            f"A named output must exist before it is read. {layer} reads {name!r}, the output of {names.later[name]}. "
            "Put the layer that makes it first, or give the parameter a default, which is used where it does not exist."
        )
    raise ValueError(f"{rule} Got {name!r} for {layer}; {names}.{way_out}")


def fields_of(
    path: str, module: nnx.Module, called: Callable[..., Any], names: Names, asked: Mapping[str, str] | None
) -> dict[str, str]:
    """The batch fields and named outputs that a layer's call gets, by keyword.

    `asked` has those of `with_fields`. Without it, a call that the user wrote gets all whose name one of its parameters
    has. A call that Flax wrote gets none, since its parameters have meanings of their own. Raises `ValueError` when a
    parameter without a default remains, or something that was asked for does not exist.
    """
    kind = type(module)
    parameters = parameters_of(called)
    layer = f"{path} ({kind.__name__})"
    if asked is not None:
        _check_asked(layer, called, names, asked)
        found = dict(asked)
    elif is_of_flax(called):
        found = {}
    else:
        found = {p.name: p.name for p in parameters if p.name in names}
    for p in parameters:
        if p.default is p.empty and p.name not in found and p.name not in KEYWORDS and p.name != RNGS:
            way_out = "Add the field or give it a default."
            if p.name in names:
                way_out = f"Ask for it: meshpipe.with_fields(layer, {p.name}={p.name!r})."
            elif p.name in names.later:
                check_exists(layer, p.name, names, "")
            raise ValueError(
                "After its input, a layer's __call__ may only require batch fields, named outputs, `train` and `rngs`. "
                f"{layer} requires {p.name!r}; {names}. {way_out}"
            )
    return found


def optional_fields(called: Callable[..., Any], fields: Mapping[str, str]) -> tuple[str, ...]:
    """The keywords that a call gets by name although the parameter has a default."""
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


def _check_asked(layer: str, called: Callable[..., Any], names: Names, asked: Mapping[str, str]) -> None:
    signature = inspect.signature(called).parameters.values()
    taken = {p.name for p in parameters_of(called)}
    for keyword, source in asked.items():
        check_exists(layer, source, names, "with_fields must name fields of the batch or named outputs.")
        if keyword not in taken and not any(p.kind is p.VAR_KEYWORD for p in signature):
            raise ValueError(
                f"with_fields must name parameters of the layer's __call__ after its input. Got {keyword!r} for "
                f"{layer}, which takes {', '.join(sorted(taken)) or 'none'}."
            )


def output_names(layers: Sequence[Any], batch_fields: Collection[str]) -> dict[str, int]:
    """The index of the layer of every named output. Raises `ValueError` for a name that is a batch field or that two
    outputs have.
    """
    found: dict[str, int] = {}
    for index, layer in enumerate(layers):
        for name in layer.names if isinstance(layer, LayerCall) else ():
            if name in batch_fields:
                raise ValueError(
                    f"A name must be that of a batch field or of an output, not of both. An output of layers/{index} "
                    f"is named {name!r}, which is a field of the batch. Choose another name."
                )
            if name in found:
                raise ValueError(
                    f"Every named output must have a name of its own. Got {name!r} for those of layers/{found[name]} "
                    f"and layers/{index}. Rename one."
                )
            found[name] = index
    return found
