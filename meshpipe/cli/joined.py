"""Runs a command in one process, or in all processes of a run together."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from meshpipe.cli.arguments import explanation
from meshpipe.cli.devices import take_devices
from meshpipe.errors import advise, is_for_the_user
from meshpipe.files import expand_fields
from meshpipe.phases import phase, silence
from meshpipe.processes.exit_codes import FAILED, INVALID
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
    if process_number(arguments) not in (None, "0"):
        silence()


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


def process_number(arguments: list[str]) -> str | None:
    """The number of this process, as far as the flags have it."""
    flag = "--process-id"
    given = [value for name, value in itertools.pairwise(arguments) if name == flag]
    given += [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{flag}=")]
    return given[-1] if given else None
