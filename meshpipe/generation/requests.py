"""Texts that are to be continued."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from meshpipe.errors import ArgumentError, kind_of
from meshpipe.generation.caching_model import POSITIONS
from meshpipe.generation.config import SamplingConfig
from meshpipe.generation.decoding_layers import SAMPLING_FIELDS

StopWhen = Callable[[Sequence[int]], bool]
"""Says of the tokens that were added to a text whether it ends with them."""


@dataclass(kw_only=True)
class Request:
    """A text that is to be continued."""

    number: int
    """Its place among the prompts."""
    prompt: Sequence[int]
    sampling: SamplingConfig
    stop_when: StopWhen | None = None
    on_end: Callable[[int], object] | None = None
    """Called with its number when all its tokens are known."""
    drawn: list[int] = field(default_factory=list)
    """The tokens that were added."""
    asked: int = 0
    """How many tokens were asked of the devices."""
    ended: bool = False


@dataclass(frozen=True)
class Drawn:
    """A token that was added to a text."""

    request: int
    """The number of the prompt, from 0."""
    token: int


def tokens_of(prompt: Any, number: int) -> list[int]:
    """A prompt that the caller wrote, as a list. Raises `ArgumentError` for what is none."""
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Iterable):
        raise ArgumentError(
            f"A prompt must be a list of tokens. Got {kind_of(prompt)} as prompt {number}. `Generator.generate` takes "
            "texts, and `tokens` a list of prompts."
        )
    return list(prompt)


def beginning_fields(input: str, rows: Sequence[Request | None], seq: int) -> dict[str, np.ndarray]:
    """The batch of beginnings, in rows of `seq` tokens. A row without a request has one token."""
    prompts = [[0] if row is None else row.prompt for row in rows]
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(rows), seq), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    positions = np.minimum(np.arange(seq, dtype=np.int32), lengths[:, None] - 1).astype(np.int32)
    return {input: tokens, POSITIONS: positions, **sampling_fields(rows)}


def sampling_fields(rows: Iterable[Request | None]) -> dict[str, np.ndarray]:
    """How the tokens of each row are drawn, by `SAMPLING_FIELDS`."""
    nothing = Request(number=0, prompt=(), sampling=SamplingConfig())
    given = [nothing if row is None else row for row in rows]
    sampling = [row.sampling for row in given]
    values = (
        np.array([each.seed for each in sampling], np.uint32),
        np.array([row.number for row in given], np.uint32),
        np.array([each.temperature for each in sampling], np.float32),
        np.array([each.top_k for each in sampling], np.int32),
        np.array([each.top_p for each in sampling], np.float32),
    )
    return dict(zip(SAMPLING_FIELDS, values, strict=True))
