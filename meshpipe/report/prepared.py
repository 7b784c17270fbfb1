"""What a folder of prepared data has, in numbers."""

from pathlib import Path

from rich.console import Console

from meshpipe.data.manifest import SPLITS, Manifest, Split
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
    ends = f"Documents end with {end}"
    if manifest.settings["chat_template"] is not None:
        ends = f"Conversations end as their template writes them, other documents with {end}"
    print_text(console, f"{ends}. Documents are {_packing(manifest)}. Fingerprint {manifest.fingerprint}.")
    noticed = [f"{what} ({number:,})" for what, number in manifest.noticed.items() if number]
    if manifest.bad:
        noticed.append(f"{count_of(manifest.bad, 'bad line')} left out, such as {manifest.bad_lines[0]}")
    if noticed:
        print_text(console, f"Noticed: {'; '.join(noticed)}.")


def _packing(manifest: Manifest) -> str:
    if manifest.settings["packing"] == "whole":
        return "cut only where longer than a window"
    return "cut where a window ends"
