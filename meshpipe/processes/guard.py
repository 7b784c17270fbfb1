"""Several processes of one run: how all of them end when one fails."""

import contextlib
import functools
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import jax
import jaxlib

from meshpipe.processes.coordination import (
    ask_now,
    beat,
    beats,
    coordinator_address,
    process_count,
    process_index,
    tell,
)
from meshpipe.processes.exit_codes import FAILED
from meshpipe.processes.last_words import LastWords, saved_sentence
from meshpipe.processes.printable import printable
from meshpipe.processes.secret import IntrusionError

ERROR = "meshpipe/error"
POLL_SECONDS = 0.5
SILENCE_SECONDS = 8.0
"""After this long without a sign of life a process counts as dead."""
COORDINATOR_SILENCE_SECONDS = 15.0
CONNECTION_MARKS = ("SocketServer", "recv()", "send()", "Connection", "Gloo", "Socket closed")
"""Parts of the errors that JAX raises for transfers and collectives whose other end is gone."""
TRANSFERS = tuple(Path(__file__).parents[1] / "pipeline" / name for name in ("peers.py", "transfer.py"))
"""The files that call JAX's transfers directly."""


class Guard:
    """While entered, a failure of one process ends all of them within seconds, each with a message that names it.

    Every process gives a sign of life now and then, and process 0, which coordinates the run, watches for them. Where a
    process cannot say why it ends, a child of it does. Each message ends with the newest checkpoint of `folder`.
    An error that leaves the block ends all processes as well, except for a `ValueError` about what cannot be, which
    every process finds by itself. With one process it does nothing. Enter it as soon as the process has joined.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self._done = threading.Event()
        self._answered = time.monotonic()
        self._last_words: LastWords | None = None

    def __enter__(self) -> "Guard":
        coordinator = coordinator_address()
        if coordinator is not None:
            self._last_words = LastWords(process_index(), coordinator, self._folder).__enter__()
            self._answered = time.monotonic()
            for work in (self._watch_others, self._watch_coordinator):
                threading.Thread(target=work, name="guard", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cannot_be = isinstance(error, ValueError) and not is_lost_connection(error)
        if process_count() > 1 and isinstance(error, Exception | SystemExit) and not cannot_be:
            if not isinstance(error, IntrusionError):
                traceback.print_exception(error)
            self.fail(error)
        self._done.set()
        if self._last_words is not None:
            self._last_words.withdraw()

    def fail(self, why: BaseException | str) -> NoReturn:
        """Tells the others that this process fails and why, and ends it.

        An error of a connection to another process, which is therefore gone, waits until it is known which process,
        and ends with that.
        """
        if process_count() == 1:
            leave(FAILED)
        message = why if isinstance(why, str) else f"{type(why).__name__}: {why}"
        if isinstance(why, BaseException) and is_lost_connection(why):
            time.sleep(SILENCE_SECONDS + 3 * POLL_SECONDS)
        if not self._done.is_set():
            try:
                tell(ERROR, f"process {process_index()} on {socket.gethostname()} failed: {message}")
            except Exception:  # another process was first, or there is nobody left to tell
                with contextlib.suppress(Exception):
                    message = ask_now(ERROR) or message
            self._stop_because(message)
        while True:  # until another thread, which was first, has ended this process
            time.sleep(POLL_SECONDS)

    def _watch_others(self) -> None:
        seen = dict.fromkeys(range(process_count()), (0, time.monotonic()))
        while not self._done.wait(POLL_SECONDS):
            try:
                beat()
                message = ask_now(ERROR)
                if message is None and process_index() == 0:
                    silent = _silent(seen)
                    if silent is not None:
                        message = f"process {silent} gives no sign of life: it was killed, or it hangs"
                        tell(ERROR, message)
            except IntrusionError as error:
                message = str(error)
                with contextlib.suppress(Exception):
                    tell(ERROR, message)
            except Exception as error:
                message = f"process 0, which coordinates the run, is gone: {error}".splitlines()[0]
            self._answered = time.monotonic()
            if message is not None:
                self._stop_because(message)

    def _watch_coordinator(self) -> None:
        """A process that is stopped, not killed, leaves questions to it without an answer."""
        while not self._done.wait(POLL_SECONDS):
            if time.monotonic() - self._answered > COORDINATOR_SILENCE_SECONDS:
                self._stop_because("process 0, which coordinates the run, does not answer")

    def _stop_because(self, message: str) -> None:
        if self._done.is_set():
            return
        self._done.set()
        text = f"meshpipe: process {process_index()} stops because {printable(message)}\n{saved_sentence(self._folder)}"
        print(text, file=sys.stderr, flush=True)
        if self._last_words is not None:
            self._last_words.withdraw()
        leave(FAILED)


def _silent(seen: dict[int, tuple[int, float]]) -> int | None:
    """A process whose last sign of life is too long ago; `seen` has what was seen of each, and when."""
    now = time.monotonic()
    for process, count in beats().items():
        if count > seen[process][0]:  # somebody may repeat an old one
            seen[process] = count, now
    return next((process for process, (_, at) in sorted(seen.items()) if now - at > SILENCE_SECONDS), None)


def is_lost_connection(error: BaseException) -> bool:
    """Whether JAX raised this error because the other end of a transfer or collective is gone.

    JAX has no type of its own for it, so its words decide, but only where JAX itself raised the error: the same words
    in an error of the user's code, such as a data source that lost its server, mean something else.
    """
    text = str(error)
    if "Traceback (most recent call last)" in text:  # of a Python function that a program calls back
        return False
    if not any(mark in text for mark in CONNECTION_MARKS):
        return False
    if isinstance(error, jax.errors.JaxRuntimeError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    origin = Path(frames[-1].filename) if frames else None
    return origin is not None and (origin in TRANSFERS or any(root in origin.parents for root in _jax_folders()))


@functools.cache
def _jax_folders() -> tuple[Path, ...]:
    return tuple(Path(str(package.__file__)).parent for package in (jax, jaxlib))


def leave(status: int) -> NoReturn:
    """Ends a process of several at once, past JAX's shutdown, which aborts processes that it finds without the others.

    Process 0 leaves a little later, since it has the messages that the others may still have to read.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if process_count() > 1 and process_index() == 0:
        time.sleep(3 * POLL_SECONDS)
    os._exit(status)
