"""Reports of a run while it trains: a file of JSON lines, and a progress line for people."""

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from meshpipe.errors import ArgumentError
from meshpipe.files import check_file
from meshpipe.run.warning import Warnings

SECONDS_BETWEEN_LINES = 30.0
"""Longest time between progress lines when the output is not a terminal, if steps are not longer."""
LONGEST_TIME = 10**9
"""Upper limit of the displayed time left, in seconds."""
LONGEST_LINE = 1 << 20
"""Upper limit of the length of a metrics line, in bytes; real lines are far shorter."""


class MetricsFile:
    """One JSON object per line, unbuffered. With a path of None, nothing is written. `also` is called with every event.

    Non-finite numbers become null, since JSON has none. A line that cannot be written (e.g. on a full disk) is left out
    entirely, with one warning on standard error; later lines are tried again.
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        append: bool = False,
        also: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._path, self._also, self._warnings = path, also, Warnings()
        self._file: FileIO | None = None
        if path is not None:
            if append:
                _cut_torn_line(Path(path))
            self._file = open(path, "ab" if append else "wb", buffering=0)  # noqa: SIM115 (closed by __exit__)

    @staticmethod
    def check(path: str | Path | None, *, append: bool = False) -> None:
        """Raises `ValueError` when the file cannot be written or holds another run. Writes nothing."""
        if path is None:
            return
        path = Path(path)
        check_file("metrics", path)
        if path.exists() and not path.is_file():
            return  # a pipe or /dev/stdout, which cannot hold an earlier run
        if not append and path.exists() and path.stat().st_size:
            raise ArgumentError(
                f"`metrics` must name a new file, so that two runs do not mix. Got {str(path)!r}, which is not empty. "
                "Name another file, remove it, or resume its run with `resume`."
            )

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        if self._also is not None:
            self._also(event, values)
        if self._file is not None:
            line = json.dumps({"event": event} | _finite(values), allow_nan=False)
            try:
                _write_whole(self._file, line.encode() + b"\n")
            except OSError as error:
                self._warnings.say_once(
                    "metrics",
                    f"a line of the metrics file {self._path} could not be written: {error.strerror}. "
                    "The run continues; the lines that cannot be written are missing.",
                )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write_whole(file: FileIO, line: bytes) -> None:
    """Writes a whole line; on an error, truncates a partial line if the file is seekable. Raises `OSError`."""
    rest = memoryview(line)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        written = len(line) - len(rest)
        if written and file.seekable():
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size - written)
            file.seek(0, os.SEEK_END)
        raise


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_torn_line(path: Path) -> None:
    """Removes an unterminated last line, which a killed run or a full disk can leave."""
    if not path.is_file():
        return
    with open(path, "r+b") as file:
        start = max(0, file.seek(0, os.SEEK_END) - LONGEST_LINE)
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)


class ProgressLine:
    """Shows step, loss, throughput and time left: a live line on a terminal, else a plain line every few steps."""

    def __init__(self, console: Console, steps: int, start: int = 0) -> None:
        self.console = console
        self._steps = steps
        self._every = lines_every(steps - start)
        self._last_line = time.monotonic()
        self._seconds_per_step: float | None = None
        self._bar: Progress | None = None
        if console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None):
            columns = (
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(24),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def step(self, values: Mapping[str, Any]) -> None:
        """Shows the `values` of one step event."""
        step, seconds = values["step"], values["step_time_s"]
        # The first step is slower than the others; the moving average forgets it quickly.
        before = seconds if self._seconds_per_step is None else self._seconds_per_step
        self._seconds_per_step = before + 0.3 * (seconds - before)
        left = timedelta(seconds=min(LONGEST_TIME, round(self._seconds_per_step * (self._steps - step))))
        text = f"loss {values['loss']:.4f}  {seconds:.3g} s/step  {speed(values)}  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._is_due(step):
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._steps}  {text}")

    def _is_due(self, step: int) -> bool:
        late = time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES
        return step == 1 or step == self._steps or step % self._every == 0 or late

    def say(self, text: str) -> None:
        """Prints a line above the live one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def lines_every(steps: int) -> int:
    """Steps between plain lines: about fifteen in a run, but at least one every hundred steps."""
    for every in (1, 2, 5, 10, 20, 50):
        if every * 15 >= steps:
            return every
    return 100


def speed(values: Mapping[str, Any]) -> str:
    """The throughput: tokens per second if the model has tokens, else examples per second."""
    unit = "tokens" if "tokens_per_s" in values else "examples"
    return f"{values[f'{unit}_per_s']:,.0f} {unit}/s"
