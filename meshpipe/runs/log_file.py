"""The log of a run: what it prints, in a file."""

import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from io import TextIOBase, TextIOWrapper
from pathlib import Path
from types import TracebackType
from typing import IO, Any, cast

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.control import Control

from meshpipe.phases import Phase, listening
from meshpipe.report.tables import PLAIN_WIDTH
from meshpipe.runs.warning import Warnings

LOGGED_SECONDS = 2.0
"""Shorter phases are not in the log."""


class LogFile(RenderHook):
    """While entered, copies all that the console and standard error receive to a file, with the time of each line, and
    adds how long each phase took, from `LOGGED_SECONDS` on.

    Live lines are left out. Lines are held back until `open`, so that a run that is refused writes nothing. When the
    file cannot be written, the run continues without it, with one warning.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._warnings = console, Warnings()
        self._plain = Console(
            file=cast(IO[str], _Lines(self._write)),
            width=PLAIN_WIDTH,
            highlight=False,
            soft_wrap=True,
            force_jupyter=False,  # else in a notebook it would print to the cell
        )
        self._file: TextIOWrapper | None = None
        self._held: list[str] = []
        self._phases = ExitStack()
        self._is_gone = False

    def open(self, path: Path) -> None:
        """Appends the lines so far, and from now on all others."""
        try:
            self._file = open(path, "a", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
            self._file.writelines(self._held)
        except OSError as error:
            self._give_up(error)
        self._held.clear()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        for renderable in renderables:
            if not isinstance(renderable, Control):
                self._plain.print(renderable)
        return renderables

    def _write(self, line: str) -> None:
        if not line.strip():
            return
        stamped = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {line}".rstrip() + "\n"
        if self._file is None:
            if not self._is_gone:
                self._held.append(stamped)
            return
        try:
            self._file.write(stamped)
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        file, self._file, self._is_gone = self._file, None, True
        if file is not None:
            with suppress(OSError):
                file.close()
        self._warnings.say_once("log", f"the log could not be written: {error}. The run continues without it.")

    def _hear(self, phase: Phase) -> None:
        if phase.seconds is not None and phase.seconds >= LOGGED_SECONDS:
            self._write(f"{phase}.")

    def __enter__(self) -> "LogFile":
        self._phases.enter_context(listening(self._hear))
        self._console.push_render_hook(self)
        self._error_stream = sys.stderr
        sys.stderr = _Both(self._error_stream, _Lines(self._write))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phases.close()
        sys.stderr = self._error_stream
        self._console.pop_render_hook()
        if self._file is not None:
            self._file.close()


class _Lines(TextIOBase):
    """A text stream that hands on whole lines."""

    def __init__(self, take: Callable[[str], None]) -> None:
        self._take, self._rest, self._lock = take, "", threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._take(line)
        return len(text)

    def flush(self) -> None:
        pass


class _Both:
    """A stream whose text also goes to another."""

    def __init__(self, stream: Any, other: Any) -> None:
        self._stream, self._other = stream, other

    def write(self, text: str) -> int:
        self._other.write(text)
        return len(text) if self._stream is None else int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
