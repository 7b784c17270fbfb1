"""What a folder of prepared data has: its numbers, and windows of it as text."""

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

from meshpipe.data.batches import Batch
from meshpipe.data.manifest import SPLITS, TOKENIZER_FOLDER, Manifest, Split
from meshpipe.data.prepared import PreparedWindows
from meshpipe.data.tokenizer import Tokenizer
from meshpipe.errors import ArgumentError
from meshpipe.report.tables import count_of, format_bytes, make_table, print_text

NAMES: dict[Split, str] = {"train": "training", "eval": "held out"}


def print_prepared(console: Console, folder: Path, manifest: Manifest) -> None:
    """The numbers of a prepared folder, and what was left out of it."""
    sources = count_of(len(manifest.sources), "file")
    size = format_bytes(sum(source["size"] for source in manifest.sources))
    print_text(
        console,
        f"{folder}: windows of {manifest.sequence_length:,} tokens from {sources} ({size}), "
        f"{manifest.vocab_size:,} different tokens",
    )
    numbers = ("texts", "windows", "tokens", "learned", "full", "size")
    table = make_table("part", *numbers, right=numbers)
    for split in SPLITS:
        counts, places = manifest.counts[split], manifest.counts[split].windows * manifest.sequence_length
        table.add_row(
            NAMES[split],
            f"{counts.texts:,}",
            f"{counts.windows:,}",
            f"{counts.pairs:,}",
            f"{counts.targets:,}",
            f"{counts.pairs / places:.1%}" if places else "",
            format_bytes(sum(file.size for file in manifest.files[split])),
        )
    console.print(table)
    end = "nothing" if manifest.end_token is None else repr(manifest.end_token)
    print_text(
        console,
        f"Documents end with {end}, and are {_packing(manifest)}. Fingerprint {manifest.fingerprint}.",
    )
    noticed = [f"{number:,} {what}" for what, number in manifest.noticed.items() if number]
    if manifest.bad:
        noticed.append(f"{count_of(manifest.bad, 'bad line')} left out, such as {manifest.bad_lines[0]}")
    if noticed:
        print_text(console, f"Noticed: {'; '.join(noticed)}.")


def _packing(manifest: Manifest) -> str:
    if manifest.settings["packing"] == "whole":
        return "cut only where longer than a window"
    return "cut where a window ends"


def print_examples(console: Console, folder: Path, split: Split, number: int) -> None:
    """The first windows of a part of the data as text. Raises `ArgumentError` if there is none."""
    windows = PreparedWindows(folder, split)
    if not len(windows):
        raise ArgumentError(f"There is nothing to show: {folder} has no {NAMES[split]} windows.")
    tokenizer = Tokenizer(folder / TOKENIZER_FOLDER)
    for index in range(min(number, len(windows))):
        console.print()
        print_text(console, f"{NAMES[split]}, window {index}")
        for segment in _segments(windows[index]):
            console.print(_as_text(segment, tokenizer))


def _segments(example: Batch) -> list[Batch]:
    """The parts of an example with the positions of one document each, without padding."""
    found = []
    for _, group in groupby(range(len(example["inputs"])), key=lambda i: int(example["segment_ids"][i])):
        places = list(group)
        segment = {name: values[places] for name, values in example.items()}
        if segment["inputs"].any() or segment["weights"].any():
            found.append(segment)
    return found


def _as_text(segment: Batch, tokenizer: Tokenizer) -> Text:
    """The text of one document, with marks around what is learned unless all is."""
    text = Text("| ")
    marks = not segment["weights"].all()
    first = tokenizer.decode(segment["inputs"][:1], special=True)
    text.append(first, "dim" if marks else "")
    for learned, group in groupby(range(len(segment["targets"])), key=lambda i: bool(segment["weights"][i])):
        part = tokenizer.decode(segment["targets"][list(group)], special=True)
        text.append(f"«{part}»" if learned and marks else part, "" if learned else "dim")
    return text
