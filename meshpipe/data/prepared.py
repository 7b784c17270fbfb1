"""Windows of tokens from folders that `meshpipe data prepare` has written, and mixtures of several such folders."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import grain
import numpy as np

from meshpipe.data.batch import Batch, DataConfig
from meshpipe.data.manifest import RecordFile, Split, read_manifest
from meshpipe.data.packing import read_record
from meshpipe.errors import ArgumentError, check_positive
from meshpipe.files import expand_fields, expanded

MOST_WINDOWS = 1 << 40
"""Of a pass over a mixture; a weight that asks for more is a mistake."""
ORDER_SEED = 0
"""Of the order of held-out windows, so that the first of them are a fair sample."""


@dataclass(frozen=True)
class _Instruction:
    """How Grain is told to read a file, so that it does not open it to count its records."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int

    @classmethod
    def of(cls, folder: Path, file: RecordFile) -> "_Instruction":
        return cls(str(folder / file.name), 0, file.records, file.records)


class PreparedWindows:
    """The windows of a prepared folder, held out or to learn from. Held-out windows have a random order of their own.

    Fields, each [seq]: `inputs` and `targets` (the token after each input) int32; `segment_ids` int32, different for
    each document and for the padding; `positions` int32, from 0 in each of them; `weights` float32, 0 if the target is
    padding or no part of an answer, else 1.
    Raises `ArgumentError` when the folder is not whole.
    """

    def __init__(self, folder: str | Path, split: Split = "train") -> None:
        self.folder, self.split = expanded("path", folder, section="data"), split
        self.manifest = read_manifest(self.folder, "path", "data")
        files = self.manifest.files[split]
        self._records = sum(file.records for file in files)
        self._source = (
            grain.sources.ArrayRecordDataSource([_Instruction.of(self.folder, file) for file in files])
            if files
            else None
        )
        self._order = np.random.default_rng(ORDER_SEED).permutation(self._records) if split == "eval" else None

    def __len__(self) -> int:
        return self._records

    def __getitem__(self, index: int) -> Batch:
        assert self._source is not None, "an empty source has no examples"
        place = index if self._order is None else int(self._order[index])
        try:
            record = self._source[place]
            return read_record(record, self.manifest.token_dtype, self.manifest.sequence_length)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"Window {place} of {self.folder} ({self.split}) cannot be read: {error}. `meshpipe data verify "
                f"{self.folder}` finds damaged files."
            ) from error

    def check_limits(self, limits: Mapping[str, int]) -> None:
        """Raises `ArgumentError` when tokens of the data, or of its tokenizer, are beyond the vocabulary of a model, or
        its windows are longer than the documents that a model with learned positions takes.
        """
        limit = min((limits[name] for name in ("inputs", "targets") if name in limits), default=None)
        found = self.manifest
        if limit is not None and max(found.vocab_size, found.largest_token + 1) > limit:
            raise ArgumentError(
                f"The vocabulary of a model must have all tokens of its data. Got {self.folder}, prepared with a "
                f"tokenizer of {max(found.vocab_size, found.largest_token + 1):,} tokens, for a model of {limit:,}. "
                "Prepare the data with the tokenizer of the model, or give the model a larger vocabulary "
                "(`model.vocab_size`)."
            )
        if found.sequence_length > limits.get("positions", found.sequence_length):
            raise ArgumentError(
                "Windows must be at most as long as the texts that a model has learned positions for. Got "
                f"{self.folder}, with windows of {found.sequence_length:,} tokens, for a model of "
                f"{limits['positions']:,} positions. Prepare the data with a shorter `sequence_length`."
            )

    def __repr__(self) -> str:
        found = self.manifest
        return (
            f"{type(self).__name__}(split={self.split}, windows={len(self)}, "
            f"sequence_length={found.sequence_length}, fingerprint={found.fingerprint})"
        )


class MixedWindows:
    """Windows from several sources, each with its share, interleaved evenly: the first n have these shares, up to one
    window per source.

    One pass reads every window of every source at least once: sources that are too short for their share are read more
    than once.
    """

    def __init__(self, sources: Sequence[PreparedWindows], weights: Sequence[float]) -> None:
        self._sources = tuple(sources)
        exact = [Fraction(weight) for weight in weights]
        self._shares = tuple(float(weight / sum(exact)) for weight in exact)
        self._of_rest = tuple(weight / sum(exact[place:]) for place, weight in enumerate(exact))
        """The share that each source has of what the sources before it leave."""
        self._length = max(
            math.ceil(len(source) * sum(exact) / weight) for source, weight in zip(sources, exact, strict=True)
        )
        if self._length > MOST_WINDOWS:
            raise ArgumentError(
                "`mixture` must have weights by which one pass over all folders has at most "
                f"{MOST_WINDOWS:,} windows. Got {', '.join(f'{weight:g}' for weight in weights)}. Raise the smallest.",
                "data",
            )
        while any(count < len(source) for count, source in zip(self._counts(), sources, strict=True)):
            self._length += 1

    def _counts(self) -> list[int]:
        """How many windows of each source a pass has."""
        counts, left = [], self._length
        for share in self._of_rest:
            counts.append(math.floor(left * share))
            left -= counts[-1]
        return counts

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        for source, share in zip(self._sources, self._of_rest, strict=True):
            before = math.floor(index * share)
            if math.floor((index + 1) * share) > before:
                return source[before % len(source)]
            index -= before
        raise AssertionError("the last source has all that the others leave")

    def check_limits(self, limits: Mapping[str, int]) -> None:
        """As of the sources."""
        for source in self._sources:
            source.check_limits(limits)

    def __repr__(self) -> str:
        parts = zip(self._shares, self._sources, strict=True)
        return f"{type(self).__name__}({', '.join(f'{share:.6g} * {source!r}' for share, source in parts)})"


@dataclass(frozen=True, kw_only=True)
class PreparedConfig(DataConfig):
    """Tokens from a folder that `meshpipe data prepare` has written, or a mixture of several such folders."""

    path: str | None = None
    """Folder of prepared data."""
    mixture: tuple[tuple[str, float], ...] = ()
    """Folders of prepared data in place of a single one, each with its weight: the share of the windows that come from
    it, relative to the others. One pass reads every window at least once, and those of folders that are too small for
    their share more than once."""

    def __post_init__(self) -> None:
        expand_fields(self, "path", section="data")
        if (self.path is None) == (not self.mixture):
            got = "neither. Pass `path`" if self.path is None else "both. To mix, set `path` to None"
            raise ArgumentError(f"Prepared data is a folder or a `mixture` of folders. Got {got}.", "data")
        for folder, weight in self.mixture:
            check_positive("mixture", weight, section="data")
            if not math.isfinite(weight):
                raise ArgumentError(f"`mixture` must have finite weights. Got {weight} for {folder!r}.", "data")

    def train_source(self) -> PreparedWindows | MixedWindows:
        return self._source("train")

    def eval_source(self) -> PreparedWindows | MixedWindows:
        return self._source("eval")

    def _source(self, split: Split) -> PreparedWindows | MixedWindows:
        if self.path is not None:
            return _not_empty(PreparedWindows(self.path, split))
        sources = [_not_empty(PreparedWindows(folder, split)) for folder, _ in self.mixture]
        first = sources[0]
        for source in sources[1:]:
            _check_alike(first, source)
        return MixedWindows(sources, [weight for _, weight in self.mixture])


def _not_empty(source: PreparedWindows) -> PreparedWindows:
    if not len(source) and source.split == "eval":
        raise ArgumentError(
            f"Evaluation needs held-out data. Got {source.folder}, prepared without any. Prepare it with --held-out "
            "0.01, or turn evaluation off with `eval_batches` 0."
        )
    if not len(source):
        raise ArgumentError(f"Training needs data. Got {source.folder}, which has held-out data alone.")
    return source


def _check_alike(one: PreparedWindows, other: PreparedWindows) -> None:
    """Raises `ArgumentError` where two folders cannot be mixed."""
    for name in ("sequence_length", "tokenizer"):
        first, second = getattr(one.manifest, name), getattr(other.manifest, name)
        if first != second:
            raise ArgumentError(
                f"Folders of a mixture must have one {name.replace('_', ' ')}. Got {str(first)[:16]} in {one.folder} "
                f"and {str(second)[:16]} in {other.folder}. Prepare one of them as the other.",
                "data",
            )
