"""Which parameters are trained: an NNX filter, or patterns of leaf paths. The others are frozen."""

from collections.abc import Callable, Collection, Iterator, Sequence
from types import EllipsisType
from typing import Any, TypeAlias

from flax import nnx

from meshpipe.errors import ArgumentError, advise, kind_of
from meshpipe.layers.layer import Layer
from meshpipe.layers.paths import join
from meshpipe.optimizer.patterns import matches

Predicate: TypeAlias = Callable[[tuple[Any, ...], Any], bool]
Trainable: TypeAlias = "str | type | bool | EllipsisType | Predicate | Sequence[Trainable] | None"
"""Patterns of leaf paths such as `layers/3` or `bias`, an NNX filter such as `nnx.LoRAParam`, or a list of both, of
which a parameter must match one. A pattern that begins with `!` excludes what it matches. None is every parameter, or,
in a model with `nnx.LoRAParam`, those alone."""


class _Parameter:
    """A parameter as a filter sees it."""

    def __init__(self, layer: Layer, key: tuple[Any, ...], variable: Any):
        self.path, self.variable = join(layer.path, key), variable
        layers, _, index = layer.path.partition("/")
        self.key = (layers, int(index), *key)


def freeze(
    layers: Sequence[Layer], trainable: Trainable = None, tied: Sequence[Sequence[str]] = ()
) -> tuple[Layer, ...]:
    """The layers, with the parameters that are not `trainable` frozen. `tied` has groups that are one parameter.

    Raises `ArgumentError` for a filter of another type, one that matches no parameter, one that leaves nothing to
    train, and one that freezes a part of a tied group.
    """
    parameters = [p for layer in layers for p in _parameters(layer)]
    trained = _trained(parameters, trainable)
    for group in tied:
        split = {path in trained: path for path in group if any(path == p.path for p in parameters)}
        if len(split) > 1:
            raise ArgumentError(
                f"Tied parameters are one, so all or none of them must be trained. `trainable` has {split[True]}, and "
                f"not {split[False]}, which is tied to it. Name both or neither."
            )
    return tuple(layer.freezing(frozenset(layer.params) - trained) for layer in layers)


def describe_trained(layers: Sequence[Layer]) -> str:
    """What is trained, in one sentence: how many arrays and numbers of how many, and which."""
    trained = {path: leaf.size for layer in layers for path, leaf in layer.params.items()}
    frozen = {path: layer.state[path].size for layer in layers for path in layer.frozen}
    arrays, numbers = len(trained) + len(frozen), sum(trained.values()) + sum(frozen.values())
    if not frozen:
        return f"Training all {arrays:,} arrays, {numbers:,} parameters."
    return (
        f"Training {len(trained):,} of {arrays:,} arrays, {sum(trained.values()):,} of {numbers:,} parameters: "
        f"{', '.join(_names(list(trained), list(frozen)))}."
    )


def describe_unused(layers: Sequence[Layer], unused: Collection[str]) -> tuple[str, ...]:
    """A sentence on the parameters whose gradients the optimizer never uses, if there are any: by leaf path."""
    sizes = {path: leaf.size for layer in layers for path, leaf in layer.params.items()}
    found = [path for path in sizes if path in unused]
    if not found:
        return ()
    names = _names(found, [path for path in sizes if path not in unused])
    return (
        f"The optimizer never uses the gradients of {len(found):,} of these arrays, "
        f"{sum(sizes[path] for path in found):,} parameters: {', '.join(names)}. "
        "Leave them out of `trainable`, and their gradients are not computed.",
    )


def _names(trained: Sequence[str], frozen: Sequence[str], most: int = 4) -> list[str]:
    """A few names that say which leaves are trained: those that all of them end in, else their layers, else paths."""
    for part in (_last, _layer):
        names = list(dict.fromkeys(map(part, trained)))
        if len(names) <= most and not set(names).intersection(map(part, frozen)):
            return names
    rest = len(trained) - (most - 1)
    return list(trained) if rest <= 1 else [*trained[: most - 1], f"and {rest} more"]


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _layer(path: str) -> str:
    return "/".join(path.split("/")[:2])


def _parameters(layer: Layer) -> Iterator[_Parameter]:
    for key, variable in nnx.to_flat_state(layer.structure):
        if join(layer.path, key) in layer.params:
            yield _Parameter(layer, key, variable)


def _trained(parameters: Sequence[_Parameter], trainable: Trainable) -> frozenset[str]:
    if trainable is None:
        adapters = frozenset(p.path for p in parameters if isinstance(p.variable, nnx.LoRAParam))
        return adapters or frozenset(p.path for p in parameters)
    members = list(trainable) if isinstance(trainable, list | tuple) else [trainable]
    found = [(member, _matched(member, parameters)) for member in members]
    chosen = [paths for member, paths in found if not _excludes(member)]
    excluded = frozenset().union(*(paths for member, paths in found if _excludes(member)))
    trained = frozenset().union(*chosen) if chosen else frozenset(p.path for p in parameters if members)
    if not trained - excluded:
        raise ArgumentError(
            f"At least one parameter must be trained. Got a `trainable` that leaves none: {_spell(trainable)}. "
            f"{_examples(parameters)}"
        )
    return trained - excluded


def _excludes(member: Any) -> bool:
    return isinstance(member, str) and member.startswith("!")


def _matched(member: Any, parameters: Sequence[_Parameter]) -> frozenset[str]:
    """The parameters that a pattern or filter matches. Raises `ArgumentError` if there are none."""
    predicate = _predicate(member)
    try:
        found = frozenset(p.path for p in parameters if predicate(p))
    except Exception as error:
        advise(error, f"This comes from `trainable`, {_spell(member)}, which was called with a path and a variable.")
        raise
    if not found:
        raise ArgumentError(
            f"`trainable` must match parameters. Got {_spell(member)}, which matches none of {len(parameters)}. "
            f"{_examples(parameters)}"
        )
    return found


def _predicate(member: Any) -> Callable[[_Parameter], bool]:
    if isinstance(member, str):
        return lambda p: matches(member.removeprefix("!"), p.path)
    if isinstance(member, list | tuple):
        parts = [_predicate(part) for part in member]
        return lambda p: any(part(p) for part in parts)
    if isinstance(member, type) and not issubclass(member, nnx.Variable):
        raise _wrong(member)
    try:
        predicate = nnx.filterlib.to_predicate(member)
    except (TypeError, ValueError):  # Flax fails to format its message
        raise _wrong(member) from None
    return lambda p: bool(predicate(p.key, p.variable))


def _wrong(member: Any) -> ArgumentError:
    got = f"the class {member.__name__}" if isinstance(member, type) else f"{_spell(member)}, {kind_of(member)}"
    return ArgumentError(
        "`trainable` must be patterns of leaf paths, an NNX filter, or a list of these. "
        f"Got {got}. Write e.g. 'layers/3/*' or nnx.LoRAParam."
    )


def _spell(member: Any) -> str:
    if isinstance(member, list | tuple) and member:
        return ", ".join(map(_spell, member))
    text = member.__name__ if isinstance(member, type) else repr(member)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _examples(parameters: Sequence[_Parameter]) -> str:
    if not parameters:
        return "The layers have no parameters."
    some = [p.path for p in parameters[:3]]
    rest = len(parameters) - len(some)
    return f"Parameters are {', '.join(some)}{f' and {rest} more' if rest else ''}."
