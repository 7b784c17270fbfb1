"""Texts that are to be continued, and the groups of them that are continued together."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from meshpipe.generation.decoder import POSITIONS, Decoder, Texts
from meshpipe.generation.sampling import SamplingConfig
from meshpipe.sharding import local_value

AHEAD = 2
"""How many tokens of a group are computed before the first of them is read: the devices never wait for the host. As
many are computed in vain when all texts of a group have ended."""

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
    drawn: list[int] = field(default_factory=list)
    """The tokens that were added."""
    ended: bool = False


@dataclass(frozen=True)
class Drawn:
    """A token that was added to a text."""

    request: int
    """The number of the prompt, from 0."""
    token: int


@dataclass(kw_only=True)
class RunningGroup:
    """Requests that are continued together, a token at a time."""

    decoder: Decoder
    requests: Sequence[Request]
    texts: Texts
    issued: int = 0
    """Tokens of each text that were asked of the devices."""
    unread: deque[jax.Array] = field(default_factory=deque)

    @classmethod
    def begin(cls, decoder: Decoder, requests: Sequence[Request], seq: int) -> "RunningGroup":
        """Reads the prompts, in rows of `seq` tokens. Returns at once."""
        group = cls(decoder=decoder, requests=requests, texts=decoder.begin(_fields(decoder, requests, seq)))
        group._issue()
        return group

    def advance(self) -> Iterator[Drawn]:
        """Asks for the next token of every text, and reads one that was asked for before; after the last, all."""
        if self._wants_more:
            self.decoder.advance(self.texts)
            self._issue()
        while self.unread and (len(self.unread) > AHEAD or not self._wants_more):
            yield from self._read()

    @property
    def has_ended(self) -> bool:
        return not self._wants_more and not self.unread

    @property
    def _wants_more(self) -> bool:
        """Whether there is a text whose next token has not been asked for."""
        return any(not request.ended and self.issued < request.sampling.max_tokens for request in self.requests)

    def _issue(self) -> None:
        self.issued += 1
        tokens = self.decoder.everywhere(self.texts)
        if tokens.is_fully_addressable:
            tokens.copy_to_host_async()
        self.unread.append(tokens)

    def _read(self) -> Iterator[Drawn]:
        read = np.asarray if self.decoder.group.is_alone else local_value  # the latter of a replicated array
        tokens = read(self.unread.popleft())
        for request, token in zip(self.requests, tokens.tolist(), strict=False):  # the group may be filled up
            if request.ended:
                continue
            if token in request.sampling.stop_tokens:
                request.ended = True
                continue
            request.drawn.append(token)
            request.ended = len(request.drawn) == request.sampling.max_tokens or (
                request.stop_when is not None and request.stop_when(request.drawn)
            )
            yield Drawn(request.number, token)


def _fields(decoder: Decoder, requests: Sequence[Request], seq: int) -> dict[str, np.ndarray]:
    """The batch of the beginnings. Rows that are left over repeat the last text."""
    rows = [*requests, *[requests[-1]] * (decoder.batch - len(requests))]
    lengths = np.array([len(row.prompt) for row in rows], np.int32)
    tokens = np.zeros((len(rows), seq), np.int32)
    for row, request in zip(tokens, rows, strict=True):
        row[: len(request.prompt)] = request.prompt
    sampling = [row.sampling for row in rows]
    return {
        decoder.input: tokens,
        POSITIONS: np.minimum(np.arange(seq, dtype=np.int32), lengths[:, None] - 1).astype(np.int32),
        "seed": np.array([each.seed for each in sampling], np.uint32),
        "request": np.array([row.number for row in rows], np.uint32),
        "temperature": np.array([each.temperature for each in sampling], np.float32),
        "top_k": np.array([each.top_k for each in sampling], np.int32),
        "top_p": np.array([each.top_p for each in sampling], np.float32),
    }
