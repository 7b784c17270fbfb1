"""What each layer, the loss and the metrics read: batch fields, and outputs of layers before."""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from meshpipe.layers.layer import Layer
from meshpipe.layers.sown import Sown, read_by_name


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the batch."""

    name: str


@dataclass(frozen=True, slots=True, order=True)
class Output:
    """What a layer puts out: what its call returns, or a value that it sows."""

    layer: int
    sown: str = ""
    """The name under which the call sows it; empty for what it returns."""


Source: TypeAlias = Field | Output


@dataclass(frozen=True)
class Wiring:
    """The graph of a model: where everything that is called gets its values from."""

    inputs: tuple[Source, ...]
    """What each layer is called with."""
    keywords: tuple[Mapping[str, Source], ...]
    """What each layer gets besides, by keyword."""
    loss: Mapping[str, Output]
    """What the loss gets by keyword, besides the output of the last layer and the microbatch."""
    metrics: Mapping[str, Output]
    """Likewise for the metrics."""
    names: Mapping[Output, str]
    """The names of outputs."""

    @property
    def output(self) -> Output:
        """What loss, metrics and prediction get: the output of the last layer."""
        return Output(len(self.inputs) - 1)

    @property
    def fields(self) -> frozenset[str]:
        """The batch fields that layers read."""
        sources = {*self.inputs, *(source for given in self.keywords for source in given.values())}
        return frozenset(source.name for source in sources if isinstance(source, Field))

    def reads(self, layer: int) -> tuple[Source, ...]:
        """What a layer is called with, and what it gets by keyword."""
        return self.inputs[layer], *self.keywords[layer].values()


def get(source: Source, batch: Mapping[str, Any], outputs: Mapping[Output, Any]) -> Any:
    """The value of a source, given the batch and the outputs of layers."""
    return batch[source.name] if isinstance(source, Field) else outputs[source]


def outputs_of(index: int, layer: Layer, value: Any, sown: Sown) -> dict[Output, Any]:
    """What a layer put out, given what its call returned and sowed.

    Raises `ArgumentError` for a name under which it sowed nothing.
    """
    read = read_by_name(sown, (name for _, name in layer.sows), layer.title)
    return {Output(index): value, **{Output(index, name): found for name, found in read.items()}}


def wire(
    layers: Sequence[Layer],
    loss: Callable[..., Any],
    metrics: Callable[..., Any] | None,
    *,
    input: str,
    fields: Collection[str],
) -> Wiring:
    """What the layers, the loss and the metrics of a model read.

    `input` is the batch field that the first layer is called with, and `fields` are those of the batch. Raises
    `ValueError` for an output that nothing uses, a name that nothing asks for, and a loss or metrics that require
    something else.
    """
    names = {Output(index): layer.name for index, layer in enumerate(layers) if layer.name is not None}
    names |= {Output(index, sown): name for index, layer in enumerate(layers) for name, sown in layer.sows}
    outputs = {name: output for output, name in names.items()}

    def source(name: str) -> Source:
        return outputs.get(name) or Field(name)

    _check_first(layers[0], input)
    inputs: list[Source] = []
    for index, layer in enumerate(layers):
        before: Source = Output(index - 1) if index else Field(input)
        inputs.append(before if layer.input is None else source(layer.input))
    wiring = Wiring(
        inputs=tuple(inputs),
        keywords=tuple({keyword: source(name) for keyword, name in layer.fields.items()} for layer in layers),
        loss=_asked("loss", loss, outputs, fields),
        metrics={} if metrics is None else _asked("metrics", metrics, outputs, fields),
        names=names,
    )
    _check_used(layers, wiring)
    return wiring


def _check_first(layer: Layer, input: str) -> None:
    if layer.input is not None and layer.input != input:
        raise ValueError(
            "The first layer is called with the batch field that `input` names. Got "
            f"input={input!r} and reading({layer.input!r}, ...) for {_spelled(layer)}. Pass input={layer.input!r}."
        )


def _asked(
    what: str, function: Callable[..., Any], outputs: Mapping[str, Output], fields: Collection[str]
) -> dict[str, Output]:
    """The named outputs that a loss or metrics ask for by their parameters after the first two."""
    parameters = _parameters(function)
    found = {p.name: outputs[p.name] for p in parameters if p.name in outputs and p.kind is not p.POSITIONAL_ONLY}
    for p in parameters:
        if p.default is p.empty and p.name not in found:
            known = f"named outputs are {', '.join(outputs)}" if outputs else "no output has a name"
            way_out = f"Name it: meshpipe.named({p.name!r}, layer), or give the parameter a default."
            if p.name in fields:
                way_out = f"Read the batch field from the microbatch: microbatch[{p.name!r}]."
            elif p.name in outputs:
                way_out = "It is given by keyword: drop the / after it."
            raise ValueError(
                f"After output and microbatch, the {what} may only require named outputs. Got the parameter "
                f"{p.name!r}; {known}. {way_out}"
            )
    return found


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those after output and microbatch that a caller may give; what a `partial` has given counts as given."""
    given = set(function.keywords) if isinstance(function, partial) else set()
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # functions of C
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [p for p in parameters if p not in positional[:2] and p.kind not in kinds and p.name not in given]


def _check_used(layers: Sequence[Layer], wiring: Wiring) -> None:
    by_name = {*wiring.loss.values(), *wiring.metrics.values()}
    for layer, keywords in zip(layers, wiring.keywords, strict=True):
        by_name.update(source for source in keywords.values() if isinstance(source, Output))
        by_name.update(output for output, name in wiring.names.items() if name == layer.input)
    for output, name in wiring.names.items():
        if output not in by_name:
            what = "sown by" if output.sown else "the output of"
            raise ValueError(
                f"A named output must be read by name. Got {name!r}, {what} {_spelled(layers[output.layer])}, which no "
                f"layer after it, nor loss, nor metrics ask for. Give a call a parameter {name!r}, ask for it with "
                f"meshpipe.with_fields(layer, keyword={name!r}), or drop the name."
            )
    used = {*by_name, *wiring.inputs, wiring.output}
    for index, layer in enumerate(layers):
        if Output(index) not in used:
            raise ValueError(
                f"Every output must be used. That of {_spelled(layer)} is not: {_spelled(layers[index + 1])} reads "
                f"{layers[index + 1].input!r} in its place. Name it, meshpipe.named(name, layer), and let a later "
                "layer or the loss ask for it by that name; or drop the layer."
            )


def _spelled(layer: Layer) -> str:
    return f"{layer.path} ({layer.class_name})"
