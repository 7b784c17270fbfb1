"""Runs a command in one process, or in all processes of a run together."""

import contextlib
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from meshpipe.cli.arguments import ParserExit
from meshpipe.cli.devices import take_devices
from meshpipe.cli.endings import explained, explanation
from meshpipe.cli.place import place_of
from meshpipe.errors import advise, is_for_the_user
from meshpipe.files import expand_fields
from meshpipe.phases import phase, silence
from meshpipe.processes.exit_codes import COMPLETED, FAILED, INVALID
from meshpipe.processes.launcher_pipe import end_with_launcher

if TYPE_CHECKING:
    from rich.console import Console

    from meshpipe.mesh import MeshConfig
    from meshpipe.processes.config import DistributedConfig
    from meshpipe.processes.guard import Guard


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How a model in a folder is computed."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of computation; by default that of the run, and float32 for published weights. bfloat16 is for
    accelerators."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype in which weights are kept; by default that of the run, and for published weights float32, or bfloat16 where
    all have it and `--dtype` is so."""
    base: Path | None = None
    """Folder of the weights below adapters; by default the one that their folder names."""

    def __post_init__(self) -> None:
        expand_fields(self, "base")


def begin_joined(arguments: list[str]) -> None:
    """What comes first in a command that may have several processes: it ends with its launcher, and only process 0
    says what it does.
    """
    end_with_launcher()
    if place_of(arguments).process_id not in (None, 0):
        silence()


@contextlib.contextmanager
def telling_others(command: str, arguments: list[str]) -> Iterator[None]:
    """While entered, an error of this process, which has not joined yet, ends the others too.

    They wait for it to join, so it prints its error, joins, and tells them. Does nothing in a run of one process.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        place = place_of(arguments)
        is_help = isinstance(error, ParserExit) and error.code == COMPLETED
        if is_help or not place.has_others:
            raise
        status = explained(command, error)
        if status is None:
            traceback.print_exception(error)
            status = FAILED
        _end_others(place, status, error)
        raise ParserExit(status) from None


def _end_others(place: "DistributedConfig", status: int, error: BaseException) -> None:
    """Joins the others and ends all; returns if it could not join."""
    from meshpipe.processes.coordination import process_count
    from meshpipe.processes.guard import Guard, leave
    from meshpipe.processes.join import join_to_report

    if isinstance(error, ParserExit):
        why = "a flag is wrong; its own messages name it."
    elif isinstance(error, ValueError):
        why = str(error)
    else:
        why = f"{type(error).__name__}: {error}"
    says = f"on {socket.gethostname()} {'found the request invalid' if status == INVALID else 'failed'}: {why}"
    print("meshpipe: telling the other processes of the run.", file=sys.stderr, flush=True)
    # They may have ended, or have been given another number of processes.
    with contextlib.suppress(ConnectionError, RuntimeError, ValueError):
        join_to_report(place, status)
        with Guard() as guard:
            guard.end_all(says, status)
    if process_count() > 1:
        leave(status)


def run_joined(distributed: "DistributedConfig", run: "Callable[[Guard], int]", folder: str | None = None) -> int:
    """Joins the other processes, if there are any, calls `run`, and returns its status; ends all processes when one of
    them fails. Messages about a failure name the newest checkpoint of `folder`.
    """
    with phase("Importing JAX"):
        from meshpipe.processes.coordination import process_count, process_index
        from meshpipe.processes.guard import Guard, leave
        from meshpipe.processes.join import join

    try:
        join(distributed)
    except ValueError as error:  # the file of its secret, or another number of processes, which all find
        if not distributed.has_others:
            raise
        status = explained("", error) or INVALID
        if process_count() > 1:
            leave(status)
        _end_others(distributed, status, error)
        return status
    except ConnectionError as error:
        print(f"meshpipe: {error}", file=sys.stderr)
        if process_count() > 1:
            leave(FAILED)
        return FAILED
    several = process_count() > 1
    if process_index() > 0:
        silence()
    try:
        with Guard(folder) as guard:
            status = run(guard)
    except Exception as error:
        if not several or not is_for_the_user(error):
            raise
        print(f"meshpipe: {explanation(error)}", file=sys.stderr)
        status = INVALID
    if several:
        leave(status)
    return status


def take_devices_of_run(mesh: "MeshConfig", console: "Console") -> None:
    """Takes the devices of a mesh, as `take_devices` does, and opens what moves arrays between
    processes.
    """
    from meshpipe.host import keep_freed_memory
    from meshpipe.pipeline.ways import open_carrier
    from meshpipe.processes.coordination import process_count

    take_devices(mesh, console)
    keep_freed_memory()
    if process_count() > 1:
        open_carrier()


@contextlib.contextmanager
def advising_on_memory() -> Iterator[None]:
    """While entered, an error of a device that has too little memory gets the way out."""
    try:
        yield
    except Exception as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # JAX has no class of its own for it
            advise(
                error,
                "Shorten the texts, lower --batch-size, or make the mesh larger (--mesh.pipeline, --mesh.tensor).",
            )
        raise
