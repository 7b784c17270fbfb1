"""Which texts a model takes, and the lengths that programs are compiled for."""

import numbers
from collections.abc import Sequence
from typing import Any

from meshpipe.errors import ArgumentError
from meshpipe.models.model import ModelConfig

LEAST_BEGINNING = 8
"""The fewest tokens of a row that holds a text."""


def power_of_two(number: int, least: int) -> int:
    """The smallest power of two from `number` on, and at least `least`."""
    return max(least, 1 << (number - 1).bit_length())


def check_tokens(model: ModelConfig, tokens: Sequence[int], text: str) -> None:
    """Raises `ArgumentError` unless the model has all tokens of `text`, as it is called."""
    vocab = model.limits().get(model.input)
    given: Sequence[Any] = tokens
    if others := [token for token in given if isinstance(token, bool) or not isinstance(token, numbers.Integral)]:
        raise ArgumentError(f"Every token must be a whole number. Got {others[0]!r:.60} in {text}.")
    if vocab is None or not tokens or 0 <= min(tokens) <= max(tokens) < vocab:
        return
    wrong = min(tokens) if min(tokens) < 0 else max(tokens)
    raise ArgumentError(
        f"Every token must be one of the model's {vocab:,}. Got {wrong} in {text}. Use the tokenizer that the model "
        "was trained with."
    )


def check_stop_tokens(model: ModelConfig, tokens: Sequence[int]) -> None:
    """Raises `ArgumentError` for tokens that the model does not have, which would end nothing."""
    vocab = model.limits().get(model.input)
    if vocab is not None and (unknown := [token for token in tokens if token >= vocab]):
        raise ArgumentError(f"`stop_tokens` must be tokens of the model, 0 to {vocab - 1}. Got {unknown[0]}.")
