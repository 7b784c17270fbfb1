"""Rows of texts that are continued together; where one ends, the next text begins."""

import itertools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
import numpy as np

from meshpipe.generation.decoder import Decoder, Texts
from meshpipe.generation.lengths import LEAST_BEGINNING, power_of_two
from meshpipe.generation.requests import Drawn, Request, beginning_fields, sampling_fields
from meshpipe.sharding import local_value

AHEAD = 2
"""How many tokens of a row are computed before the first of them is read: the devices never wait for the host. As
many are computed in vain when a text ends that could have had more."""
PADDING = 2
"""All rows begin in one forward if that computes at most so many times the positions of forwards of few rows."""


@dataclass(kw_only=True)
class RunningGroup:
    """The rows of a decoder, each with a text that is continued or free for the next."""

    decoder: Decoder
    texts: Texts
    rows: list[Request | None]
    unread: deque[tuple[jax.Array, Mapping[int, Request]]] = field(default_factory=deque)
    """Tokens that were asked for, and the texts that they are for, by row."""

    @classmethod
    def of(cls, decoder: Decoder) -> "RunningGroup":
        return cls(decoder=decoder, texts=decoder.empty(), rows=[None] * decoder.batch)

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to do for the texts that it was given."""
        return not self.unread and not any(self.rows)

    def advance(self, waiting: deque[Request]) -> None:
        """Begins waiting texts in free rows; if there are none, asks for the next token of every text. Returns at once.

        It is one or the other, so that no rank waits for the first tokens of new texts while other groups have work.
        """
        if waiting and not all(self.rows):
            self._begin(waiting)
        elif any(self.rows):
            going = {row: request for row, request in enumerate(self.rows) if request is not None}
            self.decoder.advance(self.texts, np.isin(np.arange(len(self.rows)), list(going)))
            self._ask(going)

    def read(self) -> Iterator[Drawn]:
        """The tokens that were asked for some time ago; if no text goes on, the oldest of those that are left.

        To wait for all that are left would keep the other groups from asking for theirs.
        """
        is_idle = not any(self.rows)
        while self.unread and (len(self.unread) > AHEAD or is_idle):
            is_idle = False
            tokens, texts = self.unread.popleft()
            values = np.asarray(tokens) if self.decoder.whole.group.is_alone else local_value(tokens)
            for row, request in texts.items():
                yield from self._take(row, request, int(values[row]))

    def _take(self, row: int, request: Request, token: int) -> Iterator[Drawn]:
        if request.ended:
            return
        request.ended = token in request.sampling.stop_tokens
        if not request.ended:
            request.drawn.append(token)
            request.ended = len(request.drawn) == request.sampling.max_tokens or (
                request.stop_when is not None and request.stop_when(request.drawn)
            )
            yield Drawn(request.number, token)
        if request.ended:
            if self.rows[row] is request:
                self.rows[row] = None
            if request.on_end is not None:
                request.on_end(request.number)

    def _begin(self, waiting: deque[Request]) -> None:
        was_empty = not any(self.rows)
        parts, in_turn = self.decoder.parts, self._free_rows()
        new = {row: waiting.popleft() for row in in_turn[: len(waiting)]}
        for row, request in new.items():
            self.rows[row] = request
        positions = sum(self._seq(request) for request in new.values())
        seq = max(map(self._seq, new.values()))
        if was_empty and len(self.rows) * seq <= PADDING * positions:
            self.decoder.begin(self.texts, beginning_fields(self.decoder.input, self.rows, seq))
        else:
            rows_of_part = len(self.rows) // parts
            left = [deque(row for row in new if row // rows_of_part == part) for part in range(parts)]
            while any(left):
                self._replace([rows.popleft() if rows else None for rows in left])
        self.decoder.draw_by(self.texts, sampling_fields(self.rows))
        self._ask(new)

    def _replace(self, rows: list[int | None]) -> None:
        """Begins the texts of these rows, one of each part of the data axis or none."""
        rows_of_part = len(self.rows) // len(rows)
        slots = np.array([rows_of_part if row is None else row % rows_of_part for row in rows], np.int32)
        texts = [None if row is None else self.rows[row] for row in rows]
        seq = max(self._seq(text) for text in texts if text is not None)
        self.decoder.replace(self.texts, beginning_fields(self.decoder.input, texts, seq), slots)

    def _free_rows(self) -> list[int]:
        """First one of each part of the data axis, then the next of each, which a forward can begin together."""
        rows_of_part = len(self.rows) // self.decoder.parts
        free = [row for row, request in enumerate(self.rows) if request is None]
        parts = [list(rows) for _, rows in itertools.groupby(free, key=lambda row: row // rows_of_part)]
        return [row for turn in itertools.zip_longest(*parts) for row in turn if row is not None]

    def _ask(self, texts: Mapping[int, Request]) -> None:
        tokens = self.decoder.everywhere(self.texts)
        if tokens.is_fully_addressable:
            tokens.copy_to_host_async()
        self.unread.append((tokens, texts))
        for row, request in texts.items():
            request.asked += 1
            if request.asked == request.sampling.max_tokens:
                self.rows[row] = None

    def _seq(self, request: Request) -> int:
        """The tokens of the row that its prompt is compiled for."""
        return min(power_of_two(len(request.prompt), LEAST_BEGINNING), self.decoder.whole.length)
