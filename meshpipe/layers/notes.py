"""Tells users, in sentences, what follows from the way their layers are written and is not visible in their code."""

from collections.abc import Iterator, Sequence
from typing import Any

from meshpipe.layers.layer import Layer


def notes_on(
    layers: Sequence[Layer], tied: Sequence[Sequence[str]] = (), unread: Sequence[tuple[str, str]] = ()
) -> tuple[str, ...]:
    """One sentence for each kind of effect that a reader of the layer list may not expect.

    `tied` has the groups of parameters that were found to be one variable, and `unread` the class and name of what
    layers sow and nothing reads.
    """
    return (*_tied(tied), *_short(layers), *_fields(layers), *_fixed(layers), *_once(layers), *_unread(unread))


def _tied(groups: Sequence[Sequence[str]]) -> Iterator[str]:
    if groups:
        yield f"One variable in several layers, trained as one parameter: {_some([' = '.join(g) for g in groups])}."


def _short(layers: Sequence[Layer]) -> Iterator[str]:
    """About parameters that are trained in a dtype too short for small updates."""
    of_dtype = [(leaf.dtype, path) for layer in layers for path, leaf in layer.params.items()]
    for dtype, paths in _grouped([(d, path) for d, path in of_dtype if str(d) in _PRECISION]):
        yield (
            f"Trained in {dtype}, where updates below 1/{_PRECISION[str(dtype)]} of a parameter are lost to rounding: "
            f"{_some(paths)}."
        )


_PRECISION = {"bfloat16": 256, "float16": 2048}
"""The inverse of the largest relative update that rounding takes away."""


def _fields(layers: Sequence[Layer]) -> Iterator[str]:
    outputs = {layer.name for layer in layers}
    for what, are_outputs in (("Batch fields", False), ("Named outputs", True)):
        given = [(la, tuple(k for k in la.optional if (la.fields[k] in outputs) is are_outputs)) for la in layers]
        for (name, fields), found in _grouped([((la.class_name, keys), la.path) for la, keys in given if keys]):
            yield f"{what} given to optional keywords of the same name: {', '.join(fields)} of {name} ({_some(found)})."


def _fixed(layers: Sequence[Layer]) -> Iterator[str]:
    parts = [path.rpartition(".") for layer in layers for path in layer.pinned]
    for name, found in _grouped([(name, path) for path, _, name in parts]):
        yield f"Kept in training as the modules have it: {name}=True of {_some(found)}."


def _once(layers: Sequence[Layer]) -> Iterator[str]:
    if found := [path for layer in layers for path in layer.once]:
        yield f"Run once per step, after the update: after_step of {_some(found)}."


def _unread(sown: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, found in _grouped(sown):
        yield f"Sown by {name} and dropped, since they are no scalars: {', '.join(found)}."


def _grouped(pairs: Sequence[tuple[Any, str]]) -> Iterator[tuple[Any, list[str]]]:
    for key in dict.fromkeys(key for key, _ in pairs):
        yield key, [value for other, value in pairs if other == key]


def _some(paths: Sequence[str], longest: int = 3) -> str:
    rest = len(paths) - longest
    return ", ".join(paths) if rest <= 0 else f"{', '.join(paths[:longest])} and {rest} more"
