"""`meshpipe data`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from meshpipe.cli.arguments import Command, parse, run_one_of
from meshpipe.errors import check_whole
from meshpipe.files import expand_fields
from meshpipe.phases import each, phase
from meshpipe.processes.exit_codes import COMPLETED, FAILED

USAGE = """usage: meshpipe data prepare SOURCES... --tokenizer FILE --to DIR
                             --sequence-length N [flags]
       meshpipe data show DIR [--examples N] [--split train|eval]
       meshpipe data verify DIR

prepare tokenizes text, JSON lines or Parquet and packs it into windows for
training; started again after a stop, it continues. show summarises a prepared
folder and prints windows of it, with what counts in the loss. verify checks
every byte against its checksum. meshpipe data prepare --help shows all flags."""


@dataclass(frozen=True)
class _Folder:
    directory: tyro.conf.Positional[Path]
    """Folder written by `meshpipe data prepare`."""

    def __post_init__(self) -> None:
        expand_fields(self, "directory")


@dataclass(frozen=True)
class _FolderAndExamples:
    directory: tyro.conf.Positional[Path]
    """Folder written by `meshpipe data prepare`."""
    examples: int = 0
    """Windows to print as text. Where only answers count in the loss, they stand between « and
    »."""
    split: Literal["train", "eval"] = "train"
    """Print training windows or held-out ones."""

    def __post_init__(self) -> None:
        expand_fields(self, "directory")
        check_whole("examples", self.examples, 0)


def data_prepare(arguments: list[str]) -> int:
    from meshpipe.data.preparation import PrepareConfig, prepare
    from meshpipe.report.prepared import print_prepared
    from meshpipe.report.tables import make_console, print_text

    description = "Tokenizes text and packs it into windows, in files that training reads at random."
    config = parse(PrepareConfig, arguments, "meshpipe data prepare", description)
    done = prepare(config, report=lambda text: print(f"meshpipe: {text}", file=sys.stderr))
    console = make_console()
    print_prepared(console, done.folder, done.manifest)
    said = "It was prepared already; nothing was written." if not done.made else f"It took {done.seconds:.1f} s."
    print_text(
        console,
        f"{said} Train on it with --data.path {done.folder}, or PreparedConfig(path={str(done.folder)!r}) in a recipe.",
    )
    return COMPLETED


def data_show(arguments: list[str]) -> int:
    flags = parse(_FolderAndExamples, arguments, "meshpipe data show", "Shows what a prepared folder contains.")
    from meshpipe.data.manifest import read_manifest
    from meshpipe.report.prepared import print_prepared
    from meshpipe.report.tables import make_console

    console = make_console()
    print_prepared(console, flags.directory, read_manifest(flags.directory, "DIR"))
    if flags.examples:
        with phase("Importing JAX"):
            from meshpipe.report.windows import print_examples
        print_examples(console, flags.directory, flags.split, flags.examples)
    return COMPLETED


def data_verify(arguments: list[str]) -> int:
    description = "Compares every byte of a prepared folder with the checksums written when it was prepared."
    flags = parse(_Folder, arguments, "meshpipe data verify", description)
    from meshpipe.data.manifest import SPLITS, read_manifest
    from meshpipe.data.preparation.split_writer import file_digest

    manifest = read_manifest(flags.directory, "DIR")
    files = [file for split in SPLITS for file in manifest.files[split]]
    damaged = [
        file.name for file in each("Reading", "file", files) if file_digest(flags.directory / file.name) != file.digest
    ]
    for name in damaged:
        print(f"{name}: its bytes are not those that were written. Copy it again, or prepare the data again.")
    if not damaged:
        print(f"{flags.directory}: every byte of {len(files)} files is good")
    return FAILED if damaged else COMPLETED


COMMANDS: dict[str, Command] = {"prepare": data_prepare, "show": data_show, "verify": data_verify}


def data(arguments: list[str]) -> int:
    return run_one_of(COMMANDS, arguments, "meshpipe data", USAGE)
