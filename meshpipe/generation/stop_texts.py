"""Texts that end a generated text."""

from collections.abc import Sequence
from dataclasses import dataclass

from meshpipe.errors import ArgumentError
from meshpipe.generation.tokenizer import TextTokenizer

_BYTES_OF_CHARACTER = 4
_MARGIN = 8
"""Tokens, of which the first may not decode to whole characters."""


@dataclass(frozen=True)
class StopTexts:
    """Ends a text before the first of `stops` that is in it; without any, nothing does."""

    tokenizer: TextTokenizer
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if "" in self.stops:
            raise ArgumentError("A `stop` must have at least one character. Got an empty one. Leave it out.")

    def is_in(self, tokens: Sequence[int]) -> bool:
        """Whether the text of tokens, of which the last is new, has ended."""
        if not self.stops:
            return False
        newest = max(map(len, self.stops)) * _BYTES_OF_CHARACTER + _MARGIN
        # The whole text is decoded only where its end has one.
        return self._has(tokens[-newest:]) and (len(tokens) <= newest or self._has(tokens))

    def cut(self, text: str) -> str:
        """The text up to its end."""
        return text[: min((place for place in map(text.find, self.stops) if place >= 0), default=len(text))]

    def sure(self, text: str) -> str:
        """What will be part of the text whatever follows: its last characters may begin an end."""
        text = self.cut(text)
        begun = (n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return text[: len(text) - max(begun, default=0)]

    def _has(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return any(stop in text for stop in self.stops)
