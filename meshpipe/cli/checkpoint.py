"""`meshpipe checkpoint`."""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from meshpipe.cli.arguments import Command, parse, run_one_of
from meshpipe.files import expand_fields
from meshpipe.processes.exit_codes import COMPLETED, FAILED

USAGE = """usage: meshpipe checkpoint list DIR
       meshpipe checkpoint show DIR [--step N]
       meshpipe checkpoint verify DIR [--step N]

list shows all checkpoints and their layouts; show prints the full metadata of
one checkpoint; verify checks every byte against its checksum."""


@dataclass(frozen=True)
class _Folder:
    directory: tyro.conf.Positional[Path]
    """The `--run-dir` or `--checkpoint-dir` of a run."""

    def __post_init__(self) -> None:
        expand_fields(self, "directory")


@dataclass(frozen=True)
class _FolderAndStep:
    directory: tyro.conf.Positional[Path]
    """The `--run-dir` or `--checkpoint-dir` of a run."""
    step: int | None = None
    """One step; by default, show takes the newest and verify takes all."""

    def __post_init__(self) -> None:
        expand_fields(self, "directory")


def checkpoint_list(arguments: list[str]) -> int:
    flags = parse(_Folder, arguments, "meshpipe checkpoint list", "Lists complete checkpoints.")
    from meshpipe.checkpoint import (
        CheckpointError,
        CheckpointGoneError,
        CheckpointInfo,
        describe_checkpoint,
        list_checkpoints,
    )
    from meshpipe.report.checkpoints import checkpoint_table
    from meshpipe.report.tables import make_console

    whole: list[CheckpointInfo] = []
    damaged: list[str] = []
    for step in list_checkpoints(flags.directory):
        try:
            whole.append(describe_checkpoint(flags.directory, step))
        except CheckpointGoneError:  # a run in progress removes old steps
            continue
        except CheckpointError as error:
            damaged.append(str(error))
    make_console().print(checkpoint_table(whole))
    for message in damaged:
        print(f"meshpipe: {message}", file=sys.stderr)
    return FAILED if damaged else COMPLETED


def checkpoint_show(arguments: list[str]) -> int:
    description = "Shows the full metadata of one checkpoint."
    flags = parse(_FolderAndStep, arguments, "meshpipe checkpoint show", description)
    from meshpipe.checkpoint import CheckpointGoneError, describe_checkpoint, list_checkpoints
    from meshpipe.report.checkpoints import print_checkpoint
    from meshpipe.report.tables import make_console

    while True:
        step = list_checkpoints(flags.directory)[-1] if flags.step is None else flags.step
        try:
            info = describe_checkpoint(flags.directory, step)
        except CheckpointGoneError:
            if flags.step is not None:
                raise
            continue  # a run in progress has saved a newer one
        print_checkpoint(make_console(), info)
        return COMPLETED


def checkpoint_verify(arguments: list[str]) -> int:
    description = "Compares every byte of the checkpoints with the checksums written when they were saved."
    flags = parse(_FolderAndStep, arguments, "meshpipe checkpoint verify", description)
    from meshpipe.checkpoint import CheckpointGoneError, list_checkpoints, verify_checkpoint

    damaged = False
    for step in list_checkpoints(flags.directory) if flags.step is None else [flags.step]:
        try:
            found = verify_checkpoint(flags.directory, step)
            left_out = "" if found else _left_out(flags, step)
        except CheckpointGoneError:
            if flags.step is not None:
                raise
            print(f"step {step}: removed meanwhile by the run that saves there")
            continue
        damaged = damaged or bool(found)
        print(f"step {step}: {'; '.join(found) if found else f'every byte is good{left_out}'}")
    return FAILED if damaged else COMPLETED


def _left_out(flags: _FolderAndStep, step: int) -> str:
    """What a good step leaves out, to be checked where it is."""
    from meshpipe.checkpoint import describe_checkpoint
    from meshpipe.checkpoint.base import base_of

    base = base_of(describe_checkpoint(flags.directory, step).metadata)
    return "" if base is None else f"; it holds what was trained, without its {base}"


COMMANDS: dict[str, Command] = {
    "list": checkpoint_list,
    "show": checkpoint_show,
    "verify": checkpoint_verify,
}


def checkpoint(arguments: list[str]) -> int:
    return run_one_of(COMMANDS, arguments, "meshpipe checkpoint", USAGE)
