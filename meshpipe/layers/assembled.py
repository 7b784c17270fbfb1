"""The modules of a list of layers as one module: what a trained model is called with, without meshpipe's engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from meshpipe.errors import ArgumentError, kind_of
from meshpipe.layers.constructors import constructor_of
from meshpipe.layers.fields import (
    RNGS,
    LayerCall,
    Names,
    call_of,
    check_exists,
    fields_of,
    is_given_rngs,
    output_names,
    parameters_of,
)
from meshpipe.layers.modes import mode_keywords, told
from meshpipe.layers.sown import collect, read_by_name


@dataclass(frozen=True)
class _Call:
    """How a layer is called, hashable: it is a static attribute of a module."""

    fields: tuple[tuple[str, str], ...] | None
    function: Callable[..., Any] | None
    name: str | None
    input: str | None
    sows: tuple[tuple[str, str], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*(() if self.name is None else (self.name,)), *(name for name, _ in self.sows))


class Assembled(nnx.Module):
    """All layers as one NNX module; `assemble` makes it. `layers` has their modules in order."""

    def __init__(self, modules: Sequence[nnx.Module], calls: Sequence[_Call], input: str) -> None:
        self.layers = nnx.List(modules)
        self._calls, self._input = tuple(calls), input

    def __call__(self, batch: Mapping[str, Any], *, train: bool = False, rngs: nnx.Rngs | None = None) -> Any:
        """The output of the last layer for a batch, a dict of arrays `[examples, ...]`.

        `train` goes to calls that ask for their mode; attributes such as `deterministic` stay as they are. `rngs` goes
        to calls that ask for a random stream. Raises `ValueError` for a field that is missing.
        """
        return self.outputs(batch, train=train, rngs=rngs)[0]

    def outputs(
        self, batch: Mapping[str, Any], *, train: bool = False, rngs: nnx.Rngs | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """The output of the last layer, and all named outputs by name: what a loss reads."""
        named: dict[str, Any] = {}
        makers: dict[str, str] = {}
        value = None
        for index, (module, call) in enumerate(zip(self.layers, self._calls, strict=True)):
            where = f"layers/{index} ({type(module).__name__})"
            later = {name: f"layers/{i}" for i, c in enumerate(self._calls) if i >= index for name in c.names}
            names = Names(tuple(batch), makers, later)
            called = call_of(module, call.function)
            asked = None if call.fields is None else dict(call.fields)
            fields = fields_of(f"layers/{index}", module, called, names, asked)
            source = call.input or (self._input if index == 0 else None)
            if source is not None:
                check_exists(where, source, names, "A layer must read a field of the batch or a named output.")
                value = named[source] if source in named else batch[source]
            keywords = {k: named[name] if name in named else batch[name] for k, name in fields.items()}
            keywords |= _told(where, module, called, fields, train, rngs)
            run = called if call.function is None else call.function
            if call.sows:
                value, made = nnx.capture(run, nnx.Intermediate)(module, value, **keywords)
                variables = {"/".join(map(str, key)): variable for key, variable in nnx.to_flat_state(made)}
                found = read_by_name(collect(where, variables), (name for _, name in call.sows), where)
                named |= {name: found[sown] for name, sown in call.sows}
            else:
                value = run(module, value, **keywords)
            named |= {} if call.name is None else {call.name: value}
            makers |= dict.fromkeys(call.names, where)
        return value, named


def _told(
    where: str, module: nnx.Module, called: Callable[..., Any], fields: Mapping[str, str], train: bool, rngs: Any
) -> dict[str, Any]:
    """The mode, and the random stream, for a call that asks for them."""
    modes = mode_keywords(module, [p for p in parameters_of(called) if p.name not in fields])
    found: dict[str, Any] = dict(told(module, modes, train))
    has_streams = bool(nnx.to_flat_state(nnx.state(module, nnx.RngState)))
    if is_given_rngs(called, fields, has_streams=has_streams):
        if rngs is None:
            raise ArgumentError(f"{where} asks for a random stream. Pass `rngs`, an nnx.Rngs.")
        found[RNGS] = rngs
    return found


def assemble(layers: Sequence[Any], modules: Sequence[Any] | None = None, *, input: str = "inputs") -> Assembled:
    """One NNX module that calls all layers as a trainer does: with batch fields and named outputs.

    `meshpipe.assemble(layers, trainer.modules())(batch)` is what `trainer.predict(batch)` returns, on one device.

    Arguments:
        layers: The list that the trainer was made from.
        modules: A module for each of them, from `Trainer.modules` or `meshpipe.load`. None takes the modules of the
            list, which must then hold no constructors. Values are not copied.
        input: The batch field that the first layer is called with.

    Raises `ValueError` for a layer without a module, and for lists of other lengths.
    """
    calls = [layer if isinstance(layer, LayerCall) else LayerCall(layer) for layer in layers]
    output_names(calls, ())
    if modules is not None and len(modules) != len(calls):
        raise ArgumentError(
            f"`modules` must have one entry for each layer. Got {len(modules)} for {len(calls)} layers."
        )
    found = []
    for index, call in enumerate(calls):
        module = call.layer if modules is None else modules[index]
        if not isinstance(module, nnx.Module) and modules is None:
            module = constructor_of(f"layers/{index}", module)[1]
        if not isinstance(module, nnx.Module):
            got = kind_of(call.layer if modules is None else module)
            raise ArgumentError(
                f"Every layer must have a module. layers/{index} is {got}. "
                "Pass `modules`, e.g. trainer.modules(); with several processes, meshpipe.load returns all of them."
            )
        found.append(module)
    own = (
        _Call(None if c.fields is None else tuple(sorted(c.fields.items())), c.function, c.name, c.input, c.sows)
        for c in calls
    )
    return Assembled(found, tuple(own), input)
