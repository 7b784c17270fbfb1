"""Writes texts while they are generated."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meshpipe.cli.prompts import Prompt
    from meshpipe.generation.stop_texts import StopTexts


class WrittenTexts:
    """Writes one text as its tokens come; of several, each when it and all before it have ended.

    Arguments:
        prompts: What comes before each text.
        decode: Makes text of the tokens that follow a prompt, given its number.
        stops: Of what is generated, they and what follows them are not written.
        as_json: Whether to write an object a line, in place of text.
        write: Writes at once; None in processes that write nothing.
    """

    def __init__(
        self,
        prompts: "Sequence[Prompt]",
        decode: Callable[[int, Sequence[int]], str],
        stops: "StopTexts",
        *,
        as_json: bool,
        write: Callable[[str], object] | None,
    ) -> None:
        self._prompts, self._decode, self._stops = prompts, decode, stops
        self._as_json, self._out = as_json, write
        self._tokens: list[list[int]] = [[] for _ in prompts]
        self._ended: set[int] = set()
        self._next = 0
        """All texts before this one are written."""
        self._streams = len(prompts) == 1 and not as_json
        self._shown: str | None = None
        """What is written of the only text."""

    @property
    def count(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self._tokens))

    @property
    def ended(self) -> int:
        """Texts that have ended."""
        return len(self._ended)

    def add(self, number: int, token: int) -> None:
        """A text has got a token."""
        self._tokens[number].append(token)
        if self._streams:
            self._show(self._stops.sure(self._decoded(0)))
        self._write_in_order()

    def end(self, number: int) -> None:
        """A text has all its tokens."""
        self._ended.add(number)

    def finish(self) -> None:
        """Writes all texts that have ended and are not written; of the only text, what there is."""
        if self._streams:
            self._show(self._stops.cut(self._decoded(0)), is_whole=True)
            self._write("\n")
            return
        self._write_in_order()
        for number in sorted(self._ended):
            if number >= self._next:
                self._write(self._text(number))

    def _write_in_order(self) -> None:
        while not self._streams and self._next in self._ended:
            self._write(self._text(self._next))
            self._next += 1

    def _show(self, text: str, *, is_whole: bool = False) -> None:
        """Writes what is new of the only text, unless its last character is not complete yet."""
        if self._shown is None:  # not before, since what compiles says so
            self._write(self._prompts[0].shown)
            self._shown = ""
        if is_whole or (not text.endswith("\ufffd") and text.startswith(self._shown)):
            self._write(text[len(self._shown) :])
            self._shown = text

    def _text(self, number: int) -> str:
        prompt, tokens = self._prompts[number], self._tokens[number]
        text = self._stops.cut(self._decoded(number))
        if self._as_json:
            return json.dumps({**prompt.as_json(), "text": text, "tokens": tokens}, ensure_ascii=False) + "\n"
        return f"{'' if number == 0 else chr(10)}--- {number + 1} of {len(self._prompts)}\n{prompt.shown}{text}\n"

    def _decoded(self, number: int) -> str:
        return self._decode(number, self._tokens[number])

    def _write(self, text: str) -> None:
        if self._out is not None:
            self._out(text)
