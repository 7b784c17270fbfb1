"""Packs tokenized documents into windows of one length, and windows into records of files.

A document of n tokens has n - 1 pairs of an input and its target, the token after it. A window is a number of pairs,
from one or more documents; a run of pairs of one document is a segment. So no position of a window is spent on the
border between two documents, and every token but the first of its document is the target of exactly one position.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

Example = dict[str, np.ndarray]

OPEN_WINDOWS = 64
"""Windows that wait for documents that fit, where documents are kept whole."""


@dataclass(frozen=True)
class Segment:
    """A run of tokens of one document, which is one pair shorter than it is long; at least 2 tokens."""

    tokens: np.ndarray
    """int32 [tokens]."""
    learned: np.ndarray | None = None
    """Whether each token counts as a target, bool [tokens]; None if all do. The first of a segment is no target."""

    @property
    def pairs(self) -> int:
        return len(self.tokens) - 1

    @property
    def targets(self) -> int:
        """Pairs whose target counts."""
        return self.pairs if self.learned is None else int(self.learned[1:].sum())

    def cut(self, pairs: int) -> tuple["Segment", "Segment"]:
        """The first pairs, and the rest, which begins with the last target of the first."""
        first, rest = (None, None) if self.learned is None else (self.learned[: pairs + 1], self.learned[pairs:])
        return Segment(self.tokens[: pairs + 1], first), Segment(self.tokens[pairs:], rest)


Window = list[Segment]


@runtime_checkable
class Packer(Protocol):
    """Takes documents, and gives windows of at most a number of pairs; deterministic."""

    def add(self, document: Segment) -> Iterator[Window]: ...

    def finish(self) -> Iterator[Window]:
        """The windows that are not full."""


class Following:
    """Packs documents one after the other, and cuts them where a window is full: only the last window has padding."""

    def __init__(self, length: int) -> None:
        self._length, self._open, self._room = length, Window(), length

    def add(self, document: Segment) -> Iterator[Window]:
        while document.pairs > self._room:
            first, document = document.cut(self._room)
            yield [*self._open, first]
            self._open, self._room = [], self._length
        self._open.append(document)
        self._room -= document.pairs
        if not self._room:
            yield from self.finish()

    def finish(self) -> Iterator[Window]:
        if self._open:
            yield self._open
        self._open, self._room = [], self._length


class Whole:
    """Packs each document into one window, with others that fit: only a document longer than a window is cut.

    A document goes into the fullest of the open windows that has room for it. Where none has and as many are open as
    may be, the fullest is given away.
    """

    def __init__(self, length: int, open_windows: int = OPEN_WINDOWS) -> None:
        self._length, self._limit = length, open_windows
        self._open: list[tuple[int, Window]] = []
        """Room and contents, in the order in which they were begun."""

    def add(self, document: Segment) -> Iterator[Window]:
        while document.pairs > self._length:
            first, document = document.cut(self._length)
            yield [first]
        if document.pairs == self._length:
            yield [document]
            return
        fits = [(room, place) for place, (room, _) in enumerate(self._open) if room >= document.pairs]
        if fits:
            room, place = min(fits)
            window = [*self._open.pop(place)[1], document]
        else:
            if len(self._open) == self._limit:
                _, fullest = min((room, place) for place, (room, _) in enumerate(self._open))
                yield self._open.pop(fullest)[1]
            room, place, window = self._length, len(self._open), [document]
        if room == document.pairs:
            yield window
        else:
            self._open.insert(place, (room - document.pairs, window))

    def finish(self) -> Iterator[Window]:
        for _, window in self._open:
            yield window
        self._open = []


def write_record(window: Window, dtype: np.dtype) -> bytes:
    """A window as bytes, all numbers little-endian.

    The number of segments and the tokens of each, uint32; their tokens, of `dtype`; and, unless all targets count, one
    bit for each pair, the lowest of a byte first, that says whether its target counts.
    """
    sizes = [len(window), *(len(segment.tokens) for segment in window)]
    parts = [np.asarray(sizes, "<u4").tobytes(), *(segment.tokens.astype(dtype).tobytes() for segment in window)]
    if any(segment.targets != segment.pairs for segment in window):
        bits = [np.ones(s.pairs, bool) if s.learned is None else s.learned[1:] for s in window]
        parts.append(np.packbits(np.concatenate(bits), bitorder="little").tobytes())
    return b"".join(parts)


def read_record(record: bytes, dtype: np.dtype, length: int) -> Example:
    """The example of a record, padded to a length. Fields, each [seq]: `inputs` and `targets` int32; `segment_ids`
    int32, different for each segment and for the padding; `positions` int32, from 0 in each of them; `weights` float32,
    0 where a target does not count, else 1. Raises `ValueError` for bytes that are no such record.
    """
    (count,) = np.frombuffer(record, "<u4", 1)
    sizes = np.frombuffer(record, "<u4", count, offset=4).astype(np.int64)
    start, total = 4 * (1 + int(count)), int(sizes.sum())
    tokens = np.frombuffer(record, dtype, total, offset=start).astype(np.int32)
    pairs = total - int(count)
    if not 0 < pairs <= length or sizes.min() < 2:
        raise ValueError(f"it has {total} tokens in {count} segments, for a window of {length} positions")
    ends = np.cumsum(sizes)
    is_input, is_target = np.ones(total, bool), np.ones(total, bool)
    is_input[ends - 1] = False
    is_target[ends - sizes] = False
    weights = np.ones(pairs, np.float32)
    bits = np.frombuffer(record, np.uint8, offset=start + total * dtype.itemsize)
    if bits.size:
        weights = np.unpackbits(bits, count=pairs, bitorder="little").astype(np.float32)
    in_pairs = np.append(sizes - 1, length - pairs)
    starts = np.cumsum(in_pairs) - in_pairs
    return {
        "inputs": _padded(tokens[is_input], length),
        "targets": _padded(tokens[is_target], length),
        "segment_ids": np.repeat(np.arange(in_pairs.size, dtype=np.int32), in_pairs),
        "positions": (np.arange(length) - np.repeat(starts, in_pairs)).astype(np.int32),
        "weights": _padded(weights, length),
    }


def _padded(values: np.ndarray, length: int) -> np.ndarray:
    padded = np.zeros(length, values.dtype)
    padded[: values.size] = values
    return padded
