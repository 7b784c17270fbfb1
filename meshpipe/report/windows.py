"""Windows of prepared data as text."""

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.text import Text

from meshpipe.data.manifest import TOKENIZER_FOLDER, Split
from meshpipe.data.packing import Example
from meshpipe.data.prepared import PreparedWindows
from meshpipe.data.tokenizer import Tokenizer
from meshpipe.errors import ArgumentError
from meshpipe.report.prepared import NAMES
from meshpipe.report.tables import print_text


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


def _segments(example: Example) -> list[Example]:
    """The parts of an example with the positions of one document each, without padding."""
    found = []
    for _, group in groupby(range(len(example["inputs"])), key=lambda i: int(example["segment_ids"][i])):
        places = list(group)
        segment = {name: values[places] for name, values in example.items()}
        if segment["inputs"].any() or segment["weights"].any():
            found.append(segment)
    return found


def _as_text(segment: Example, tokenizer: Tokenizer) -> Text:
    """The text of one document, with marks around what is learned unless all is."""
    text = Text("| ")
    marks = not segment["weights"].all()
    first = tokenizer.decode(segment["inputs"][:1], special=True)
    text.append(first, "dim" if marks else "")
    for learned, group in groupby(range(len(segment["targets"])), key=lambda i: bool(segment["weights"][i])):
        part = tokenizer.decode(segment["targets"][list(group)], special=True)
        text.append(f"«{part}»" if learned and marks else part, "" if learned else "dim")
    return text
