"""Checks the data of a recipe before anything is compiled."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from meshpipe.errors import ArgumentError

SAMPLES = 64
"""Number of examples to check, spread over the data."""


@runtime_checkable
class KnowsLimits(Protocol):
    """A source that knows how large its values are, so that no example has to be read."""

    def check_limits(self, limits: Mapping[str, int]) -> None: ...


def check_source(source: Any) -> Any:
    """Returns the source if it has a length and its first example is a dict of fields; else raises `ArgumentError`."""
    kind = type(source).__name__
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise ArgumentError(
            f"A data source must have __len__ and __getitem__. Got {source!r:.80}, of type {kind}. "
            "A list of dicts is one."
        )
    try:
        length = len(source)
    except (OverflowError, TypeError, ValueError) as error:
        raise ArgumentError(f"A data source must have a length. len() of {kind} says: {error}.") from error
    example = source[0] if length else {}
    if not isinstance(example, Mapping) or not all(isinstance(name, str) for name in example):
        raise ArgumentError(
            "An example must be a dict of arrays by the names of their fields. "
            f"Got {example!r:.80}, of type {type(example).__name__}, from {kind}."
        )
    return source


def check_limits(source: Any, limits: Mapping[str, int]) -> None:
    """Raises `ArgumentError` when a sampled example has a field value that is not below its limit, e.g. a label beyond
    the classes of a model.
    """
    if not limits:
        return
    if isinstance(source, KnowsLimits):
        source.check_limits(limits)
        return
    length = len(source)
    for index in sorted({place * length // SAMPLES for place in range(min(SAMPLES, length))}):
        example = source[index]
        for name, limit in limits.items():
            if name in example and (largest := int(np.max(example[name], initial=0))) >= limit:
                raise ArgumentError(
                    f"Every value of {name} must be below {limit}, the limit of the model. Got {largest} in example "
                    f"{index}. Give the model more classes, a larger vocabulary or more positions, or use other data."
                )
