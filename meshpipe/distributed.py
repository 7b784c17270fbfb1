"""Several processes of one run: how they find each other, and how all of them end when one fails."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NoReturn

import jax

from meshpipe.coordination import ask_now, beat, beats, coordinator_address, process_count, process_index, tell
from meshpipe.last_words import LastWords, saved_sentence
from meshpipe.signals import StopRequest

ERROR, STOP = "meshpipe/error", "meshpipe/stop"
POLL_SECONDS = 0.5
SILENCE_SECONDS = 8.0
"""After this long without a sign of life a process counts as dead."""
COORDINATOR_SILENCE_SECONDS = 15.0
JOIN_SECONDS = 300.0
"""How long processes wait for each other to join; hosts may start at different times."""
SHUTDOWN_SECONDS = 30
CONNECTION_MARKS = ("SocketServer", "recv()", "send()", "Connection", "Gloo", "Socket closed")
"""Parts of the errors of transfers and collectives whose other end is gone."""
FAILED = 1


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """How this process joins others in one run; without any of it, a run has one process unless its cluster says more.

    Tasks of Slurm (`srun`), Open MPI and Cloud TPU find out everything by themselves, by `jax.distributed.initialize`.
    """

    coordinator: str | None = None
    """HOST:PORT at which process 0 listens, the same for all processes; HOST is how the others reach its machine."""
    process_id: int | None = None
    """Number of this process, from 0."""
    process_count: int | None = None
    """Processes of the run; each is started with the same command and its own number."""
    transfers: Literal["auto", "sockets"] = "auto"
    """How arrays move between processes: `auto` leaves it to an accelerator's own way (NCCL on GPUs), `sockets` takes
    them through the memory of the hosts, as on CPU: slower, and also where processes share a GPU."""
    step_timeout: float = 0.0
    """Seconds without a finished step after which the run fails and says what each rank waits for; 0 waits for ever."""

    def __post_init__(self) -> None:
        if self.step_timeout < 0:
            raise ValueError(f"--step-timeout must be at least 0. Got {self.step_timeout}.")
        given = [self.coordinator, self.process_id, self.process_count]
        if any(value is not None for value in given) and any(value is None for value in given):
            raise ValueError(
                "--coordinator, --process-id and --process-count belong together. "
                f"Got {self.coordinator}, {self.process_id} and {self.process_count}. Give all three, or none."
            )
        if self.coordinator is None or self.process_id is None or self.process_count is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"--coordinator must be HOST:PORT, e.g. 10.0.0.5:4321. Got {self.coordinator!r}.")
        if not 0 <= self.process_id < self.process_count:
            raise ValueError(
                "--process-id must be at least 0 and below --process-count. "
                f"Got {self.process_id} of {self.process_count}."
            )


def join(config: DistributedConfig) -> None:
    """Meets the other processes of the run; does nothing where there are none.

    Must be called before JAX is first used. When they do not come together in time, JAX can only abort, so this process
    ends before it would, with a message. Raises `ConnectionError` when it is clear earlier that they cannot.
    """
    if config.coordinator is None and not _in_cluster(os.environ):
        return
    if config.process_count == 1:
        return
    if config.coordinator is not None and config.process_id == 0:
        _check_can_listen(config.coordinator)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # JAX would abort every process when one is gone; `Guard` ends them with a message and what was saved.
    jax.config.update("jax_enable_recoverability", True)
    # JAX would take SIGTERM for itself, and nobody would hear of it before `StopRequest` is entered.
    jax.config.update("jax_enable_preemption_service", False)
    timer = threading.Timer(JOIN_SECONDS, _give_up_joining, [config])
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.process_count,
            config.process_id,
            initialization_timeout=2 * round(JOIN_SECONDS),
            coordinator_bind_address=config.coordinator if config.process_id == 0 else None,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except Exception as error:
        raise ConnectionError(
            f"Process {config.process_id} could not join the {config.process_count} of the run at "
            f"{config.coordinator}: {error}"
        ) from error
    finally:
        timer.cancel()


def _check_can_listen(address: str) -> None:
    """JAX would wait for ever where somebody else listens."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, _, _, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that have ended do not matter
            probe.bind(place)
    except OSError as error:
        raise ConnectionError(
            f"Process 0 must be able to listen at --coordinator. Got {address}: {error.strerror}. "
            "Name its own machine and a port that is free, and start process 0 once."
        ) from error


def _give_up_joining(config: DistributedConfig) -> None:
    own = "this process" if config.process_id is None else f"process {config.process_id}"
    count = "" if config.process_count is None else f" {config.process_count}"
    where = "" if config.coordinator is None else f" at {config.coordinator}"
    print(
        f"meshpipe: {own} stops because not all{count} processes of the run came together{where} "
        f"within {JOIN_SECONDS:.0f} s. Look at what the others say, and start all with the same address and count.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(FAILED)


def _in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of a job for which JAX finds the others."""
    sizes = (environment.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(size not in ("", "1") for size in sizes) or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def own_address(coordinator: str | None) -> str:
    """The address of this machine's interface that leads to the coordinator, by which other processes reach it."""
    host, _, port = (coordinator or "127.0.0.1:1").rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((host.strip("[]"), int(port)))
        return str(probe.getsockname()[0])


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
        cannot_be = isinstance(error, ValueError) and not _is_lost_connection(str(error))
        if process_count() > 1 and isinstance(error, Exception) and not cannot_be:
            traceback.print_exception(error)
            self.fail(f"{type(error).__name__}: {error}")
        self._done.set()
        if self._last_words is not None:
            self._last_words.withdraw()

    def fail(self, message: str) -> NoReturn:
        """Tells the others that this process fails and why, and ends it.

        What looks as if another process were gone waits until it is known which, and ends with that.
        """
        if process_count() == 1:
            leave(FAILED)
        if _is_lost_connection(message):
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
        seen = dict.fromkeys(range(process_count()), ("", time.monotonic()))
        while not self._done.wait(POLL_SECONDS):
            try:
                beat()
                message = ask_now(ERROR)
                if message is None and process_index() == 0:
                    silent = _silent(seen)
                    if silent is not None:
                        message = f"process {silent} gives no sign of life: it was killed, or it hangs"
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
        text = f"meshpipe: process {process_index()} stops because {message}\n{saved_sentence(self._folder)}"
        print(text, file=sys.stderr, flush=True)
        if self._last_words is not None:
            self._last_words.withdraw()
        leave(FAILED)


class StopTogether:
    """Lets all processes of a run stop after the same step when one of them is asked to, without a barrier.

    It relies on a loop that hands over a step only after it has read the result of the step before the last, which
    needs all processes to have handed over that one. So whoever is asked after handing over step k can let all stop
    after step k + 2: nobody has handed over more by then, and everybody looks before handing over the next.
    """

    def __init__(self, request: StopRequest) -> None:
        self._request = request
        self._has_told = False

    def after(self, step: int) -> bool:
        """Whether `step`, the last that was handed over, is the last of the run."""
        if process_count() == 1:
            return bool(self._request)
        if self._request.signal is not None and not self._has_told:
            self._has_told = True
            with contextlib.suppress(RuntimeError):  # another process was asked as well, and was first
                tell(STOP, f"{step + 2} {int(self._request.signal)}")
        agreed = ask_now(STOP)
        if agreed is None:
            return False
        last, number = map(int, agreed.split())
        self._request.signal = signal.Signals(number)
        return step >= last


def _silent(seen: dict[int, tuple[str, float]]) -> int | None:
    """A process whose last sign of life is too long ago; `seen` has what was seen of each, and when."""
    now = time.monotonic()
    for process, sign in beats().items():
        if seen[process][0] != sign:
            seen[process] = sign, now
    return next((process for process, (_, at) in sorted(seen.items()) if now - at > SILENCE_SECONDS), None)


def _is_lost_connection(message: str) -> bool:
    return any(mark in message for mark in CONNECTION_MARKS)


def leave(status: int) -> NoReturn:
    """Ends a process of several at once, past JAX's shutdown, which aborts processes that it finds without the others.

    Process 0 leaves a little later, since it has the messages that the others may still have to read.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if process_count() > 1 and process_index() == 0:
        time.sleep(3 * POLL_SECONDS)
    os._exit(status)
