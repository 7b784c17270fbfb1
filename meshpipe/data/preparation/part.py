"""Prepares one part: reads, tokenizes, packs and writes it."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from meshpipe.data.chat import ChatError
from meshpipe.data.manifest import PARTS, Counts, RecordFile, Split
from meshpipe.data.packing import Segment
from meshpipe.data.preparation.documents import BadRecordError, Document
from meshpipe.data.preparation.job import Job
from meshpipe.data.preparation.records import place, read_records
from meshpipe.data.preparation.sources import Part, Slice
from meshpipe.data.preparation.split_writer import SplitWriter, write_whole
from meshpipe.data.preparation.tokenized import tokenize
from meshpipe.errors import ArgumentError

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 20, 1024
"""What is tokenized at a time, on all cores."""
SHOWN = 20
"""Bad lines that are reported one by one."""
EMPTY, UNANSWERED = "empty texts left out", "texts without a token to learn left out"
CUT = "texts longer than a window were cut"


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """A finished part, as its file in `.parts` says it."""

    key: str
    files: dict[Split, RecordFile]
    counts: dict[Split, Counts]
    largest_token: int
    noticed: dict[str, int]
    """How many documents were left out or cut, by reason."""
    bad: int
    """Lines that could not be read."""
    bad_lines: tuple[str, ...]
    """The first of them."""
    texts: tuple[int, ...]
    """Of each slice."""

    @classmethod
    def read(cls, folder: Path, number: int, key: str) -> "PartResult | None":
        """The result of a part that was finished as the key says; None if it has to be made."""
        try:
            found = json.loads(_file(folder, number).read_text())
            if found["key"] != key:
                return None
            files = {split: RecordFile(**one) for split, one in found["files"].items()}
            counts = {split: Counts(**one) for split, one in found["counts"].items()}
            if any((folder / one.name).stat().st_size != one.size for one in files.values()):
                return None
            lists = {name: tuple(found[name]) for name in ("bad_lines", "texts")}
            return cls(**{**found, "files": files, "counts": counts, **lists})
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError):
            return None

    def write(self, folder: Path, number: int) -> None:
        write_whole(_file(folder, number), json.dumps(asdict(self), ensure_ascii=False).encode())


def _file(folder: Path, number: int) -> Path:
    return folder / PARTS / f"{number:05d}.json"


class PartMaker:
    """Makes one part of a job in a folder.

    `progress` is told what share of it is done, and how many tokens it has; `report` about bad lines, of which
    `allowed` may be left out.
    """

    def __init__(
        self,
        job: Job,
        part: Part,
        folder: Path,
        *,
        allowed: int,
        progress: Callable[[float, int], object],
        report: Callable[[str], object],
    ) -> None:
        self._job, self._part, self._folder = job, part, folder
        self._allowed, self._progress, self._report = allowed, progress, report
        splits: tuple[Split, ...] = ("eval",) if part.held_out else ("train", "eval")
        self._outputs = {
            split: SplitWriter(folder, f"{split}-{part.number:05d}.array_record", job.packer(), job.dtype)
            for split in splits
        }
        self._noticed: Counter[str] = Counter()
        self._bad, self._bad_lines = 0, list[str]()
        self._done = 0.0

    def make(self) -> PartResult:
        """Writes the part's files and what is known of it. Raises `ArgumentError` for one bad line too many."""
        texts: list[int] = []
        for one in self._part.slices:
            before = self._texts
            for batch in _batched(self._documents_of(one)):
                self._take(batch)
                self._progress(self._done / self._part.size, sum(out.counts.pairs for out in self._outputs.values()))
            self._done = sum(other.size for other in self._part.slices[: len(texts) + 1])
            texts.append(self._texts - before)
        return self._finish(texts)

    @property
    def _texts(self) -> int:
        return sum(output.counts.texts for output in self._outputs.values())

    def _documents_of(self, part: Slice) -> Iterator[Document]:
        job, began = self._job, self._done
        fields = job.fields[part.file.path]

        def read(share: float) -> None:
            self._done = began + share * part.size

        for record in read_records(part, job.config.delimiter, job.piece_bytes, fields.columns, read):
            try:
                if record.problem:
                    raise BadRecordError(record.problem)
                empty = True
                for document in fields.documents(record, job.template, job.piece_bytes, job.config.longest_piece):
                    empty = False
                    yield self._placed(document, part)
                self._noticed[EMPTY] += empty
            except (BadRecordError, ChatError) as error:
                self._leave_out(part, record.number, error)

    def _placed(self, document: Document, part: Slice) -> Document:
        """The document with its bytes counted from the first of all files, if its place decides about it."""
        before = self._job.offsets.get(part.file.path)
        if document.span is None or before is None:
            return replace(document, span=None) if document.span is not None else document
        return replace(document, span=(before + document.span[0], before + document.span[1]))

    def _leave_out(self, part: Slice, number: int, error: Exception) -> None:
        self._bad += 1
        is_too_many, is_shown = self._bad > self._allowed, len(self._bad_lines) < SHOWN
        if not is_too_many and not is_shown:
            return
        where = place(part, number, self._job.config.delimiter)  # reads the file up to there
        if is_too_many:
            allowed = self._job.config.skip_bad_lines
            rest = f" It is one more than the {allowed:,} of `skip_bad_lines`." if allowed else ""
            what = "documents" if part.file.kind == "text" else "rows" if part.file.kind == "parquet" else "lines"
            raise ArgumentError(
                f"{where}: {error}.{rest} Mend it, or leave such {what} out with `skip_bad_lines` and their number."
            ) from error
        self._bad_lines.append(f"{where}: {error}")
        self._report(f"{self._bad_lines[-1]}. It is left out.")

    def _take(self, documents: Sequence[Document]) -> None:
        """Tokenizes documents and gives each to the part of the data that it belongs to."""
        length = self._job.config.sequence_length
        for document, segment in zip(documents, tokenize(documents, self._job.tokenizer, self._job.end), strict=True):
            if segment.pairs < 1:
                self._noticed[EMPTY] += 1
                continue
            self._noticed[CUT] += int(self._job.is_whole and segment.pairs > length)
            learned = [one for one in _cut(segment, length) if one.targets] if self._job.is_whole else [segment]
            if not learned or not segment.targets:
                self._noticed[UNANSWERED] += 1
                continue
            self._outputs[self._split(document)].add(learned)

    def _split(self, document: Document) -> Split:
        share, size = self._job.held_out, self._job.piece_bytes
        if self._part.held_out:
            return "eval"
        if document.span is not None:
            start, stop = (place * share / size for place in document.span)
            return "eval" if math.floor(stop) > math.floor(start) else "train"
        return "eval" if document.side < share * 2**64 else "train"

    def _finish(self, texts: Sequence[int]) -> PartResult:
        written = {split: output.finish() for split, output in self._outputs.items()}
        result = PartResult(
            key=self._job.key(self._part),
            files={split: file for split, file in written.items() if file is not None},
            counts={split: output.counts for split, output in self._outputs.items()},
            largest_token=max(output.largest_token for output in self._outputs.values()),
            noticed=dict(self._noticed),
            bad=self._bad,
            bad_lines=tuple(self._bad_lines),
            texts=tuple(texts),
        )
        result.write(self._folder, self._part.number)
        return result


def _cut(document: Segment, length: int) -> Iterator[Segment]:
    """The document in pieces that fit into windows."""
    while document.pairs > length:
        first, document = document.cut(length)
        yield first
    yield document


def _batched(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch, characters = list[Document](), 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
