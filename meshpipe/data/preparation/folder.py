"""Prepares a folder, part by part; a stopped preparation continues with the part that it was at."""

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshpipe.data.manifest import (
    FILE_NAME,
    NAME,
    PARTS,
    SPLITS,
    TOKENIZER_FOLDER,
    Counts,
    Manifest,
    is_begun,
    read_manifest,
)
from meshpipe.data.preparation.config import MEBI, PrepareConfig
from meshpipe.data.preparation.job import Job
from meshpipe.data.preparation.part import SHOWN, PartMaker, PartResult
from meshpipe.data.preparation.sources import Part
from meshpipe.data.preparation.split_writer import write_whole, writing_to
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder, remove_empty
from meshpipe.phases import phase

LOCK = "lock"


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, and how it came to be."""

    folder: Path
    manifest: Manifest
    parts: int
    """How many parts it has."""
    made: int
    """How many of them this call made; the others were there."""
    seconds: float


def prepare(config: PrepareConfig, report: Callable[[str], object] = print) -> Prepared:
    """Prepares the sources of a config as windows of tokens, in files that `PreparedConfig` reads.

    The same tokenizer, settings and sources give the same files. `report` gets sentences for people as it goes on.
    Raises `ArgumentError` for what cannot be prepared; what was finished by then is kept, and the folder is not whole.
    """
    began = time.monotonic()
    job, folder = Job.of(config), Path(config.to)
    before = _existing(folder, job)
    if before is not None:
        return Prepared(folder, before, len(job.parts), 0, time.monotonic() - began)
    if job.files.others:
        names, more = ", ".join(map(str, job.files.others[:5])), len(job.files.others) - 5
        report(f"Not read, being empty or of another kind: {names}{f', and {more:,} more' if more > 0 else ''}.")
    with _locked(folder):
        (folder / NAME).unlink(missing_ok=True)  # from here on it is not whole
        known = [PartResult.read(folder, part.number, job.key(part)) for part in job.parts]
        _remove_others(folder, known)
        if any(known):
            report(f"Continuing: {sum(one is not None for one in known)} of {len(known)} parts are done.")
        try:
            manifest = _manifest(job, _make_parts(job, folder, known, report))
        except ArgumentError:
            _clean_up(job, folder)
            raise
        with writing_to(folder):
            job.tokenizer.copy_to(folder / TOKENIZER_FOLDER)
        write_whole(folder / NAME, manifest.to_json().encode())
        shutil.rmtree(folder / PARTS)
    return Prepared(folder, manifest, len(known), known.count(None), time.monotonic() - began)


def _existing(folder: Path, job: Job) -> Manifest | None:
    """The manifest of a folder that is whole and as the job would make it.

    Raises `ArgumentError` for a folder with anything else, that may not be replaced or cannot be written.
    """
    check_folder("to", folder)
    if not folder.exists():
        return None
    if (folder / NAME).exists():
        with contextlib.suppress(ArgumentError):
            manifest = read_manifest(folder)
            if manifest.inputs == job.inputs():
                return manifest
        if not job.config.overwrite:
            raise ArgumentError(
                f"`to` must be a new folder, or one prepared from the same sources with the same settings. Got "
                f"{str(folder)!r}, which is prepared otherwise. Name another folder, or replace it with `overwrite`."
            )
    elif not is_begun(folder) and any(folder.iterdir()):
        raise ArgumentError(
            f"`to` must be a new or empty folder. Got {str(folder)!r}, which has {next(folder.iterdir()).name!r}."
        )
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """While entered, no other process prepares the folder. Raises `ArgumentError` if one does."""
    try:
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        stream = (folder / PARTS / LOCK).open("w")
    except OSError as error:
        raise ArgumentError(f"`to` must be a writable folder. Got {str(folder)!r}: {error.strerror}.") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ArgumentError(
                f"Only one process may prepare a folder. Got {str(folder)!r}, which another one prepares now."
            ) from None
        yield


def _remove_others(folder: Path, known: Sequence[PartResult | None]) -> None:
    """Removes all files of parts but those that are known to be as they should be."""
    kept = {f"{number:05d}.json" for number, one in enumerate(known) if one is not None} | {LOCK}
    for file in (folder / PARTS).iterdir():
        if file.name not in kept:
            file.unlink()
    files = {file.name for one in known if one is not None for file in one.files.values()}
    for file in folder.iterdir():
        if FILE_NAME.fullmatch(file.name) and file.name not in files:
            file.unlink()


def _clean_up(job: Job, folder: Path) -> None:
    """Keeps finished parts, unless all are: then they would not do. Removes what is left of folders that are empty."""
    known = [PartResult.read(folder, part.number, job.key(part)) for part in job.parts]
    _remove_others(folder, [None] * len(known) if all(known) else known)
    if all(known) or not any(known):
        (folder / PARTS / LOCK).unlink()
        remove_empty([folder / PARTS, folder])


def _make_parts(
    job: Job, folder: Path, known: Sequence[PartResult | None], report: Callable[[str], object]
) -> list[PartResult]:
    total = sum(part.size for part, one in zip(job.parts, known, strict=True) if one is None)
    results: list[PartResult] = []
    with _Progress(total) as progress:
        for part, one in zip(job.parts, known, strict=True):
            if one is None:
                bad = sum(result.bad for result in (*results, *known[part.number :]) if result is not None)
                allowed = job.config.skip_bad_lines - bad
                maker = PartMaker(job, part, folder, allowed=allowed, progress=progress.of(part), report=report)
                one = maker.make()
                progress.add(part, one)
            results.append(one)
    return results


class _Progress:
    """Tells how far a preparation is."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._tokens = total, 0.0, 0
        self._phase = phase("Preparing")
        self._began = time.monotonic()

    def __enter__(self) -> "_Progress":
        self._phase.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._phase.describe("Preparing")
        self._phase.end()

    def of(self, part: Part) -> Callable[[float, int], None]:
        def tell(share: float, tokens: int) -> None:
            done, seconds = self._done + share * part.size, time.monotonic() - self._began
            speed = (self._tokens + tokens) / max(seconds, 1e-9)
            left = seconds * (self._total / max(done, 1) - 1)
            self._phase.describe(
                f"Preparing {done / MEBI:,.0f} of {self._total / MEBI:,.0f} MiB, {speed / 1e6:.2f} million tokens/s, "
                f"{left:,.0f} s left"
            )

        return tell

    def add(self, part: Part, result: PartResult) -> None:
        """A part is done."""
        self._done += part.size
        self._tokens += sum(counts.pairs for counts in result.counts.values())


def _manifest(job: Job, results: Sequence[PartResult]) -> Manifest:
    """What all parts are together. Raises `ArgumentError` when there is nothing to learn, or nothing held out."""
    files = {split: tuple(one.files[split] for one in results if split in one.files) for split in SPLITS}
    counts = {split: sum((one.counts.get(split, Counts()) for one in results), Counts()) for split in SPLITS}
    noticed = sum((Counter(one.noticed) for one in results), Counter[str]())
    _check_enough(job, counts, noticed)
    end = None if job.end is None else job.tokenizer.name(job.end)
    identity = [job.settings(), [file.digest for split in SPLITS for file in files[split]]]
    return Manifest(
        fingerprint=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32],
        inputs=job.inputs(),
        tokenizer=job.tokenizer.digest,
        vocab_size=job.tokenizer.base_vocab_size,
        largest_token=max((one.largest_token for one in results), default=0),
        end_token=end,
        sequence_length=job.config.sequence_length,
        dtype=job.dtype.str,
        files=files,
        counts=counts,
        settings=job.settings(),
        sources=_sources(job, results),
        noticed=dict(noticed),
        bad=sum(one.bad for one in results),
        bad_lines=tuple(line for one in results for line in one.bad_lines)[:SHOWN],
    )


def _check_enough(job: Job, counts: dict[Any, Counts], noticed: Counter[str]) -> None:
    if not counts["train"].windows:
        left_out = "".join(f", {number:,} {what}" for what, number in noticed.items() if number)
        held_out = "1 text" if counts["eval"].texts == 1 else f"{counts['eval'].texts:,} texts"
        raise ArgumentError(
            f"There must be something to learn. Got {held_out} held out{left_out}, and no other. Give "
            "more sources, or a smaller `held_out`."
        )
    if not counts["eval"].windows and (job.held_out or job.config.eval_sources):
        texts = counts["train"].texts
        of = "one text" if texts == 1 else f"{texts:,} texts"
        raise ArgumentError(
            f"Nothing would be held out: `held_out` {job.held_out:g} of {of} is too little. Pass a "
            "larger share, files of their own as `eval_sources`, or `held_out` 0 for none."
        )


def _sources(job: Job, results: Sequence[PartResult]) -> tuple[dict[str, Any], ...]:
    """The files that were read, and how many texts each gave."""
    texts: Counter[Path] = Counter()
    for part, result in zip(job.parts, results, strict=True):
        for one, number in zip(part.slices, result.texts, strict=True):
            texts[one.file.path] += number
    return tuple(
        {"path": str(file.path), "kind": file.kind, "size": file.size, "texts": texts[file.path]}
        for file in job.files.files
    )
