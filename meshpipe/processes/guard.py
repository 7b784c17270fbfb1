"""Several processes of one run: how all of them end when one fails."""

import contextlib
import functools
import importlib.util
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import jax

from meshpipe.errors import is_for_the_user
from meshpipe.processes.coordination import (
    check_own_keys,
    coordinator_address,
    heartbeats,
    process_count,
    process_index,
    send_heartbeat,
    set_key,
    try_get_key,
)
from meshpipe.processes.exit_codes import FAILED, INVALID
from meshpipe.processes.exit_reporter import STOPPED_SECONDS, ExitReporter, saved_sentence, stopped_sentence
from meshpipe.processes.launcher_pipe import report_guarded
from meshpipe.processes.printable import printable
from meshpipe.processes.progress import Progress, Steps
from meshpipe.processes.secret import IntrusionError
from meshpipe.processes.uneven_exit import leave_to_guard

ERROR = "meshpipe/error"
POLL_SECONDS = 0.5
SILENCE_SECONDS = 8.0
"""After this long without a sign of life a process counts as dead."""
COORDINATOR_SILENCE_SECONDS = 15.0
BLAME_SECONDS = 60.0
"""How long after this process did not run whatever is wrong with the others is put down to that."""
CONNECTION_MARKS = ("SocketServer", "recv()", "send()", "Connection", "Gloo", "Socket closed")
"""Parts of the errors that JAX raises for transfers and collectives whose other end is gone."""
TRANSFERS = tuple(
    Path(__file__).parents[1] / "pipeline" / name for name in ("peers.py", "transfer.py", "future_arrays.py")
)
"""The files that call JAX's transfers directly."""


class Guard:
    """While entered, a failure of one process ends all of them within seconds, each with a message that names it.

    Every process gives a sign of life now and then, and process 0, which coordinates the run, watches for them. Where a
    process cannot say why it ends, a child of it does. Each message ends with the newest checkpoint of `folder`.
    An error that leaves the block ends all processes as well, with exit code 2 where it is a `ValueError` about an
    invalid request. With one process it does nothing. Enter it as soon as the process has joined.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self.progress: Progress | None = None
        """How far this process is, where it runs steps; the others can read it."""
        self._stopped_until, self._stopped_for = -math.inf, 0.0
        """When this process was last found not to have run for a while, and for how long."""
        self._done = threading.Event()
        self._answered = time.monotonic()
        self._exit_reporter: ExitReporter | None = None

    def __enter__(self) -> "Guard":
        coordinator = coordinator_address()
        if coordinator is not None:
            self._exit_reporter = ExitReporter(process_index(), coordinator, self._folder).__enter__()
            self._answered = time.monotonic()
            for work in (self._watch_others, self._watch_coordinator):
                threading.Thread(target=work, name="guard", daemon=True).start()
            report_guarded(process_index())
            leave_to_guard()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if process_count() > 1 and isinstance(error, Exception | SystemExit):
            lost = is_lost_connection(error)
            if is_for_the_user(error) and not lost:  # whoever found the same by itself says so itself
                with contextlib.suppress(Exception):
                    set_key(ERROR, f"{INVALID} process {process_index()} on {socket.gethostname()} refused it: {error}")
            else:
                if not lost and not isinstance(error, IntrusionError):  # those are said in a sentence
                    traceback.print_exception(error)
                self.fail(error)
        self._done.set()
        if self._exit_reporter is not None:
            self._exit_reporter.cancel()

    def fail(self, why: BaseException | str) -> NoReturn:
        """Tells the others that this process fails and why, and ends it.

        An error of a connection to another process, which is therefore gone, waits until it is known which process,
        and ends with that.
        """
        if process_count() == 1:
            leave(FAILED)
        message = str(why) if isinstance(why, str | IntrusionError) else f"{type(why).__name__}: {why}"
        if isinstance(why, BaseException) and is_lost_connection(why):
            time.sleep(SILENCE_SECONDS + 3 * POLL_SECONDS)
        if not self._done.is_set():
            told = f"{FAILED} {message}"
            try:
                set_key(ERROR, f"{FAILED} process {process_index()} on {socket.gethostname()} failed: {message}")
            except Exception:  # another process was first, or there is nobody left to tell
                with contextlib.suppress(Exception):
                    told = try_get_key(ERROR) or told
            self._stop_as_told(told)
        while True:  # until another thread, which was first, has ended this process
            time.sleep(POLL_SECONDS)

    def give_up(self, message: str) -> NoReturn:
        """Ends all processes, or this one if it is alone, with a message that it prints."""
        if process_count() == 1:
            print(f"meshpipe: {message}.\n{saved_sentence(self._folder)}", file=sys.stderr, flush=True)
        self.fail(message)

    def end_early(self, received: signal.Signals) -> NoReturn:
        """Ends all processes because this one was asked to stop when there is nothing to save yet."""
        status = 128 + received
        if process_count() > 1:
            with contextlib.suppress(Exception):
                set_key(ERROR, f"{status} process {process_index()} was asked to stop by {received.name}.")
        self._done.set()
        if self._exit_reporter is not None:
            self._exit_reporter.cancel()
        leave(status)

    def steps_of_all(self) -> dict[int, Steps]:
        """How far each process that runs steps has come, by its last sign of life."""
        return {process: Steps.parse(text) for process, (_, text) in heartbeats().items() if text}

    def _watch_others(self) -> None:
        seen = dict.fromkeys(range(process_count()), (0, time.monotonic()))
        while not self._done.wait(POLL_SECONDS):
            told = None
            try:
                send_heartbeat("" if self.progress is None else str(self.progress.steps))
                told = try_get_key(ERROR)
                if told is None:
                    check_own_keys()
                if told is None and process_index() == 0:
                    silent = _silent(seen, max(self._stopped_until, 0.0))
                    if silent is not None:
                        told = f"{FAILED} process {silent} sends no heartbeat: it was killed, or it hangs"
                        set_key(ERROR, told)
            except IntrusionError as error:
                told = f"{FAILED} {error}"
                with contextlib.suppress(Exception):
                    set_key(ERROR, told)
            except Exception as error:
                told = f"{FAILED} process 0, which coordinates the run, is gone: {error}".splitlines()[0]
            self._answered = time.monotonic()
            if told is not None:
                self._stop_as_told(told)

    def _watch_coordinator(self) -> None:
        """A process that is stopped, not killed, leaves questions to it without an answer."""
        while True:
            before = time.monotonic()
            if self._done.wait(POLL_SECONDS):
                return
            now = time.monotonic()
            if now - before > STOPPED_SECONDS:  # it cannot have heard anything meanwhile
                self._stopped_until, self._stopped_for = now, now - before
                self._answered = now
            if self._exit_reporter is not None:
                self._exit_reporter.heartbeat()
            if now - self._answered > COORDINATOR_SILENCE_SECONDS:
                self._stop_because("process 0, which coordinates the run, does not answer", FAILED)

    def _stop_as_told(self, told: str) -> None:
        status, _, message = told.partition(" ")
        self._stop_because(message, int(status))

    def _stop_because(self, message: str, status: int) -> None:
        if self._done.is_set():
            return
        self._done.set()
        if status == FAILED and time.monotonic() - self._stopped_until < BLAME_SECONDS:
            message = f"{stopped_sentence(self._stopped_for)} Now {message}"
        end = saved_sentence(self._folder) if status == FAILED else ""
        text = f"meshpipe: process {process_index()} stops because {printable(message)}\n{end}".rstrip()
        print(text, file=sys.stderr, flush=True)
        if self._exit_reporter is not None:
            self._exit_reporter.cancel()
        leave(status)


def _silent(seen: dict[int, tuple[int, float]], since: float) -> int | None:
    """A process whose last sign of life is too long ago; `seen` has what was seen of each, and when.

    Nothing was to be seen before `since`.
    """
    now = time.monotonic()
    for process, (count, _) in heartbeats().items():
        if count > seen[process][0]:  # somebody may repeat an old one
            seen[process] = count, now
    return next((process for process, (_, at) in sorted(seen.items()) if now - max(at, since) > SILENCE_SECONDS), None)


def is_lost_connection(error: BaseException) -> bool:
    """Whether JAX raised this error because the other end of a transfer or collective is gone.

    JAX has no type of its own for it, so its words decide, but only where JAX itself raised the error: the same words
    in an error of the user's code, such as a data source that lost its server, mean something else.
    """
    if error.__cause__ is not None and is_lost_connection(error.__cause__):
        return True
    text = str(error)
    if "Traceback (most recent call last)" in text:  # of a Python function that a program calls back
        return False
    of_jax = isinstance(error, jax.errors.JaxRuntimeError)
    if of_jax and text.startswith("UNAVAILABLE"):  # the coordinator does not answer
        return True
    if not any(mark in text for mark in CONNECTION_MARKS):
        return False
    if of_jax:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    origin = Path(frames[-1].filename) if frames else None
    return origin is not None and (origin in TRANSFERS or any(root in origin.parents for root in _jax_folders()))


@functools.cache
def _jax_folders() -> tuple[Path, ...]:
    found = [importlib.util.find_spec(package) for package in ("jax", "jaxlib")]
    return tuple(Path(spec.origin).parent for spec in found if spec is not None and spec.origin is not None)


def leave(status: int) -> NoReturn:
    """Ends a process of several at once, past JAX's shutdown, which aborts processes that it finds without the others.

    Process 0 leaves a little later, since it has the messages that the others may still have to read.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if process_count() > 1 and process_index() == 0:
        time.sleep(3 * POLL_SECONDS)
    os._exit(status)
