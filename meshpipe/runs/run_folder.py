"""One folder for all outputs of a run."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from meshpipe.checkpoint.names import CHECKPOINTS
from meshpipe.checkpoint.reader import CheckpointReader
from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder, missing_folders, remove_empty
from meshpipe.processes.coordination import process_index
from meshpipe.report.curves import draw_curves
from meshpipe.report.past_run import METRICS, PastRunError, read_run
from meshpipe.runs.warning import Warnings

SETTINGS = "config.json"
CURVES = "metrics.png"
LOG = "log.txt"
TRACE = "trace.json"
PROFILE = "profile"


def in_run_dir(config: Config) -> Config:
    """The config with paths in `run_dir` for all outputs that have no path of their own."""
    if config.run_dir is None:
        return config
    folder = Path(config.run_dir)
    checkpoint, observe = config.checkpoint, config.observe
    if checkpoint.checkpoint_dir is None:
        checkpoint = replace(checkpoint, checkpoint_dir=str(folder / CHECKPOINTS))
    if observe.track and observe.track_dir is None:
        observe = replace(observe, track_dir=str(folder))
    if observe.profile_steps is not None and observe.profile_dir is None:
        observe = replace(observe, profile_dir=str(folder / PROFILE))
    metrics, trace = config.metrics or str(folder / METRICS), config.trace or str(folder / TRACE)
    return replace(config, checkpoint=checkpoint, observe=observe, metrics=metrics, trace=trace)


@contextmanager
def run_folder(config: Config, undo: list[Callable[[], object]]) -> Iterator[Path | None]:
    """Makes the folder of a run, if it is to have one; removes it when an error leaves it empty.

    To `undo` it adds what a stop before the first step calls, so that the folder is as it was before.
    Raises `ArgumentError` when it cannot be written, or holds another run.
    """
    if config.run_dir is None:
        yield None
        return
    folder = Path(config.run_dir)
    check_folder("run_dir", folder)
    used = used_by(folder)
    if used is not None and not config.checkpoint.may_continue:
        raise ArgumentError(
            "A new run needs a `run_dir` of its own, so that two runs do not mix. "
            f"Got {config.run_dir!r}, which holds {used} of an earlier run. "
            f"{_way_out(config)}"
        )
    made = missing_folders(folder)
    was_empty = not any((folder / name).exists() for name in (SETTINGS, METRICS, LOG))
    folder.mkdir(parents=True, exist_ok=True)

    def tidy() -> None:
        if was_empty and process_index() == 0:
            _remove_start(folder)
        remove_empty(made)

    undo.append(tidy)
    try:
        yield folder
    except KeyboardInterrupt:
        tidy()
        raise
    except BaseException:
        remove_empty(made)
        raise


def used_by(folder: Path) -> str | None:
    """What tells that a run has trained in the folder, or None.

    A run that was killed before its first step may leave an empty metrics file, a log and a lock, but nothing that
    another run could mix with.
    """
    if (folder / SETTINGS).exists():
        return SETTINGS
    with suppress(FileNotFoundError):
        if (folder / METRICS).stat().st_size:
            return METRICS
    return CHECKPOINTS if CheckpointReader(folder / CHECKPOINTS).steps() else None


def _remove_start(folder: Path) -> None:
    """Removes what a run writes before its first step, if it has not come to that."""
    if used_by(folder) is None:
        for name in (METRICS, LOG):
            (folder / name).unlink(missing_ok=True)


def _way_out(config: Config) -> str:
    """What to do about a folder that an earlier run has used."""
    if CheckpointReader(str(config.checkpoint.checkpoint_dir)).steps():
        return "Pass `resume` to continue that run, or name another folder."
    return "That run saved nothing to continue from: name another folder, or remove this one."


def write_settings(folder: Path, values: Mapping[str, Any], warnings: Warnings) -> None:
    """Writes the settings of the run to `config.json`, whole or not at all; warns if it cannot."""
    file = folder / SETTINGS
    partial = file.with_suffix(".partial")
    try:
        partial.write_text(json.dumps(values, indent=2) + "\n")
        os.replace(partial, file)
    except OSError as error:
        warnings.say_once("settings", f"the settings could not be written: {error}. The run continues without them.")


def draw_run(folder: Path, config: Config, console: Console) -> None:
    """Draws the curves of the run; says why if it cannot."""
    try:
        draw_curves([read_run(Path(str(config.metrics)), folder.resolve().name)], folder / CURVES)
    except PastRunError:  # it has no step
        return
    except Exception as error:  # from the file system, or from Matplotlib
        console.print(f"The curves were not drawn: {error}", markup=False)
