"""Ends all processes of a run when one fails."""

import contextlib
import functools
import importlib.util
import math
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
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
from meshpipe.processes.stop import exit_now
from meshpipe.processes.uneven_exit import leave_to_guard

ERROR = "meshpipe/error"
POLL_SECONDS = 0.5
SILENCE_SECONDS = 8.0
"""After this long without a heartbeat, a process counts as dead."""
COORDINATOR_SILENCE_SECONDS = 15.0
START_SECONDS = 10.0
"""How long process 0, which holds the messages, waits for the others to begin to read them."""
BLAME_SECONDS = 60.0
"""A problem with the others this soon after a pause of this process is attributed to the pause."""
CONNECTION_MARKS = ("SocketServer", "recv()", "send()", "Connection", "Gloo", "Socket closed")
"""Parts of the errors that JAX raises for transfers and collectives whose peer is gone."""
TRANSFERS = tuple(
    Path(__file__).parents[1] / "pipeline" / name
    for name in ("peers.py", "pulls.py", "transfer.py", "future_arrays.py")
)
"""The files that call JAX's transfers directly."""


class Guard:
    """While entered, a failure of one process ends all of them within seconds, each with a message that names it.

    Every process sends heartbeats to process 0, the coordinator, which watches them. A child process reports the exit
    of a process that cannot report it. Each message ends with the newest checkpoint of `folder`.
    An error that leaves the block ends all processes too; the exit code is 2 for a `ValueError` about an invalid
    request. With one process it does nothing. Enter it as soon as the process has joined.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder
        self.progress: Progress | None = None
        """Progress of this process once it runs steps; heartbeats carry it to the others."""
        self.undo: list[Callable[[], object]] = []
        """Called, the last first, when the process is stopped before its first step: each removes what it left."""
        self._stopped_until, self._stopped_for = -math.inf, 0.0
        """The end of this process's last pause (not scheduled, or stopped), and its length in seconds."""
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
            if is_for_the_user(error) and not lost:  # a process that finds the same error prints it itself
                self._tell(f"on {socket.gethostname()} found the request invalid: {error}", INVALID)
            else:
                if not lost and not isinstance(error, IntrusionError):  # one sentence explains those
                    traceback.print_exception(error)
                self.fail(error)
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._done.set()
        if self._exit_reporter is not None:
            self._exit_reporter.cancel()

    def fail(self, why: BaseException | str) -> NoReturn:
        """Reports to the others that this process fails and why, and ends it.

        A lost connection means that another process is gone. Then this process waits until that one is identified, and
        ends with its name.
        """
        if process_count() == 1:
            leave(FAILED)
        message = str(why) if isinstance(why, str | IntrusionError) else f"{type(why).__name__}: {why}"
        if isinstance(why, BaseException) and is_lost_connection(why):
            time.sleep(SILENCE_SECONDS + 3 * POLL_SECONDS)
        if not self._done.is_set():
            failure = f"{FAILED} {message}"
            try:
                set_key(ERROR, f"{FAILED} process {process_index()} on {socket.gethostname()} failed: {message}")
            except Exception:  # another process was first, or the coordinator is gone
                with contextlib.suppress(Exception):
                    failure = try_get_key(ERROR) or failure
            self._stop_with(failure)
        while True:  # another thread was first and will end this process
            time.sleep(POLL_SECONDS)

    def give_up(self, message: str) -> NoReturn:
        """Ends all processes, and prints a message."""
        if process_count() == 1:
            print(f"meshpipe: {message}.\n{saved_sentence(self._folder)}", file=sys.stderr, flush=True)
        self.fail(message)

    def end_early(self, received: signal.Signals) -> NoReturn:
        """Ends all processes because this one received a signal before there was anything to save."""
        self.end_all(f"was asked to stop by {received.name}.", 128 + received)

    def end_all(self, why: str, status: int) -> NoReturn:
        """Ends all processes with `status`. `why` follows the number of this process, which has printed it itself."""
        if process_count() > 1:
            self._tell(why, status)
        self._stop_watching()
        leave(status, () if status in (FAILED, INVALID) else self.undo)

    def _tell(self, why: str, status: int) -> None:
        with contextlib.suppress(Exception):  # another process was first, or the coordinator is gone
            set_key(ERROR, f"{status} process {process_index()} {why}")
        with contextlib.suppress(Exception):
            send_heartbeat("")  # process 0 waits for one of each
        self._stop_watching()  # else this process would find its own message, and end with it
        _await_readers()

    def steps_of_all(self) -> dict[int, Steps]:
        """The progress of each process that runs steps, from its last heartbeat."""
        return {process: Steps.parse(text) for process, (_, text) in heartbeats().items() if text}

    def _watch_others(self) -> None:
        seen = dict.fromkeys(range(process_count()), (0, time.monotonic()))
        while not self._done.wait(POLL_SECONDS):
            failure = None
            try:
                send_heartbeat("" if self.progress is None else str(self.progress.steps))
                failure = try_get_key(ERROR)
                if failure is None:
                    check_own_keys()
                if failure is None and process_index() == 0:
                    silent = _silent(seen, max(self._stopped_until, 0.0))
                    if silent is not None:
                        failure = f"{FAILED} process {silent} sends no heartbeat: it was killed, or it hangs"
                        set_key(ERROR, failure)
            except IntrusionError as error:
                failure = f"{FAILED} {error}"
                with contextlib.suppress(Exception):
                    set_key(ERROR, failure)
            except Exception as error:
                failure = f"{FAILED} process 0, which coordinates the run, is gone: {error}".splitlines()[0]
            self._answered = time.monotonic()
            if failure is not None:
                self._stop_with(failure)

    def _watch_coordinator(self) -> None:
        """Notices a process 0 that was stopped, not killed: calls to it then never return."""
        while True:
            before = time.monotonic()
            if self._done.wait(POLL_SECONDS):
                return
            now = time.monotonic()
            if now - before > STOPPED_SECONDS:  # this process was paused and could not receive answers
                self._stopped_until, self._stopped_for = now, now - before
                self._answered = now
            if self._exit_reporter is not None:
                self._exit_reporter.heartbeat()
            if now - self._answered > COORDINATOR_SILENCE_SECONDS:
                self._stop_because("process 0, which coordinates the run, does not answer", FAILED)

    def _stop_with(self, failure: str) -> None:
        status, _, message = failure.partition(" ")
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
        _await_readers()
        leave(status, () if status in (FAILED, INVALID) else self.undo)


def _await_readers() -> None:
    """In process 0, waits until all others have sent a heartbeat, after which they read messages."""
    deadline = time.monotonic() + START_SECONDS
    with contextlib.suppress(Exception):
        while process_index() == 0 and time.monotonic() < deadline:
            if heartbeats().keys() >= set(range(1, process_count())):
                return
            time.sleep(POLL_SECONDS / 5)


def _silent(seen: dict[int, tuple[int, float]], since: float) -> int | None:
    """A process whose last heartbeat is too old. `seen` holds the last count of each process and its time.

    Silence before `since` does not count.
    """
    now = time.monotonic()
    for process, (count, _) in heartbeats().items():
        if count > seen[process][0]:  # an old heartbeat may be replayed
            seen[process] = count, now
    return next((process for process, (_, at) in sorted(seen.items()) if now - max(at, since) > SILENCE_SECONDS), None)


def is_lost_connection(error: BaseException) -> bool:
    """Whether JAX raised this error because the peer of a transfer or collective is gone.

    JAX has no exception type for this, so the message decides, but only if JAX itself raised the error. The same words
    in an error of the user's code mean something else, e.g. a data source that lost its server.
    """
    if error.__cause__ is not None and is_lost_connection(error.__cause__):
        return True
    text = str(error)
    if "Traceback (most recent call last)" in text:  # raised by a Python callback of a program
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


def leave(status: int, undo: Sequence[Callable[[], object]] = ()) -> NoReturn:
    """Exits immediately and skips JAX's shutdown, which aborts a process whose peers are gone.

    Just before that it calls all of `undo`, the last first. Where all processes end the same way, it first calls what
    was given to `before_leaving`.
    Process 0 exits a little later than the others, which may still have to read messages from it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if status not in (FAILED, INVALID):
        for call in _last:
            with contextlib.suppress(Exception):  # the others may be gone
                call()
    if process_count() > 1 and process_index() == 0:
        time.sleep(3 * POLL_SECONDS)
    for remove in reversed(undo):
        with contextlib.suppress(Exception):  # the process ends anyway
            remove()
    exit_now(status)


def before_leaving(call: Callable[[], object]) -> None:
    """Has `leave` call this where all processes have completed, or stopped together."""
    _last.append(call)


_last: list[Callable[[], object]] = []
