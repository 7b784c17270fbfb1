"""Experiment trackers, which receive the metrics of a run beside the metrics file."""

import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from meshpipe.config import Config
from meshpipe.errors import ArgumentError
from meshpipe.files import check_folder
from meshpipe.processes.coordination import process_index
from meshpipe.runs.record import config_values
from meshpipe.runs.start import Start

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
"""The package that writes for each tracker."""
FLUSH_SECONDS = 5.0
"""Longest time that TensorBoard's values wait in memory, if steps are not longer."""
WANDB_RUN = "wandb-run.txt"
"""File in the run's folder with the id of its run of Weights & Biases, for a resumed run to continue it."""


@runtime_checkable
class Tracker(Protocol):
    """Receives the settings of a run, its metrics by step, and how it ended."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Called once, before anything is compiled, with the settings as JSON values."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Called for each step and each evaluation. Must not wait for a network."""

    def end(self, status: str) -> None:
        """Called once, with `completed`, `stopped` or `failed`."""


def check_trackers(config: Config) -> None:
    """Raises `ArgumentError` when a tracker's package is missing, or its folder cannot be written."""
    for name in config.observe.track:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ArgumentError(
                f"`track` {name} needs the package {PACKAGES[name]}, which is not installed. "
                f"Install it by: pip install 'meshpipe[{name}]'."
            )
    if config.observe.track_dir is not None:
        check_folder("track_dir", config.observe.track_dir)


@contextmanager
def started_trackers(config: Config, recipe: str, start: Start | None) -> Iterator[list[Tracker]]:
    """The trackers that the config names, started, in process 0; in others there are none. An error ends them.

    Raises `ArgumentError` when one does not start, for example without a key for Weights & Biases.
    """
    step = 0 if start is None or start.weights_only else start.step
    started: list[Tracker] = []
    try:
        for name in config.observe.track if process_index() == 0 else ():
            tracker = _make(name, config, recipe, step)
            try:
                tracker.start(config_values(config))
            except Exception as error:
                raise ArgumentError(f"`track` {name} could not be started: {error}") from error
            started.append(tracker)
        yield started
    except BaseException:
        for tracker in started:
            with suppress(Exception):
                tracker.end("failed")
        raise


def _make(name: str, config: Config, recipe: str, step: int) -> Tracker:
    """The tracker of a run that continues after `step`."""
    folder = None if config.observe.track_dir is None else Path(config.observe.track_dir)
    if name == "wandb":
        return WeightsAndBiases(folder, recipe)
    assert folder is not None
    return TensorBoard(folder / "tensorboard", step)


class TensorBoard:
    """Writes event files, in the calling thread: a few hundred bytes a step."""

    def __init__(self, folder: Path, step: int) -> None:
        self._folder, self._step = folder, step
        self._config: Mapping[str, Any] = {}
        self._records: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        self._config = config  # written with the first values, so that a run that is refused writes nothing

    def _open(self) -> None:
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import text

        self._folder.mkdir(parents=True, exist_ok=True)
        continues = any(self._folder.glob("events.out.tfevents.*"))
        host = os.uname().nodename
        self._records = RecordWriter(str(self._folder / f"events.out.tfevents.{time.time():.6f}.{host}.{os.getpid()}"))
        self._flushed = time.monotonic()
        self._write(Event(file_version="brain.Event:2"))
        if continues:  # hides what the earlier part of the run wrote of later steps
            self._write(Event(step=self._step + 1, session_log=SessionLog(status=SessionLog.START)))
        settings = "\n".join(f"    {line}" for line in json.dumps(self._config, indent=2).splitlines())
        self._write(Event(step=self._step, summary=text("config", settings)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        if self._records is None:
            self._open()
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(Event(step=step, summary=Summary(value=scalars)))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._records.flush()
            self._flushed = time.monotonic()

    def end(self, status: str) -> None:
        if self._records is not None:
            self._records.close()


class WeightsAndBiases:
    """A run of Weights & Biases, in the folder of the run if it has one; its own threads and process do the work."""

    def __init__(self, folder: Path | None, recipe: str) -> None:
        self._folder, self._recipe = folder, recipe
        self._run: Any = None

    def start(self, config: Mapping[str, Any]) -> None:
        import wandb

        known = None if self._folder is None else self._folder / WANDB_RUN
        before = known.read_text().strip() if known is not None and known.is_file() else None
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        name = self._recipe if self._folder is None else self._folder.resolve().name
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "meshpipe"),
            name=os.environ.get("WANDB_NAME", name),
            dir=None if self._folder is None else str(self._folder),
            id=before,
            resume="allow",
            config={"recipe": self._recipe, **config},
            settings=wandb.Settings(console="off"),
        )
        if known is not None and before is None:
            known.write_text(f"{self._run.id}\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def end(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1 if status == "failed" else 0)
