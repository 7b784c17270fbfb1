"""Starts the processes of one run on this machine, relays their output and signals, and ends them together."""

import itertools
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.text import Text

from meshpipe.processes.launcher_pipe import LauncherPipe
from meshpipe.processes.printable import printable
from meshpipe.processes.secret import VARIABLE

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
SECONDS_TO_END = 20.0
"""How long processes may take to end by themselves after one of them failed."""
SECONDS_TO_JOIN = 3.0
"""The same for processes that have not joined yet, which would wait for the one that failed."""
POLL_SECONDS = 0.05
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGTERM,
}
"""Signals to the launcher, and those that it forwards to its processes, all of which make them save."""
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")
"""Holds one folder per GPU, on Linux."""
NOT_RESTARTED = (0, 2, 129, 130, 131, 143)
"""Exit codes of runs that completed, were invalid, or were stopped."""

Command = Callable[[int, int], Sequence[str]]
"""Makes the command of a process from its number and the number of restarts so far."""


@dataclass
class Launch:
    """One run of several processes, restarted at most `max_restarts` times after failures."""

    num_processes: int
    command: Command
    max_restarts: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds_to_end: float = SECONDS_TO_END

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"--processes must be at least 1. Got {self.num_processes}.")
        if self.max_restarts < 0:
            raise ValueError(f"--max-restarts must be at least 0. Got {self.max_restarts}.")
        self._stop: signal.Signals | None = None
        self._processes: list[subprocess.Popen[str]] = []

    def run(self) -> int:
        """Runs all processes, and returns the exit code of the first that failed, else 0.

        SIGINT, SIGTERM, SIGHUP and SIGQUIT to this process stop all of them; they also stop if it is killed.
        """
        count = _count_gpus(os.environ | dict(self.environment))
        if 0 < count < self.num_processes:
            _say(
                f"{self.num_processes} processes share {count} GPU{'s' if count > 1 else ''}, which NCCL refuses: "
                "the run needs --transfers sockets, and XLA_PYTHON_CLIENT_PREALLOCATE=false in its environment."
            )
        # An ignored signal stays ignored, as SIGHUP under nohup.
        taken = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._pass_on) for number in taken}
        try:
            restart = 0
            while True:
                code = self._exit_code(self._run_once(restart))
                if code in NOT_RESTARTED or self._stop is not None or restart == self.max_restarts:
                    return code
                restart += 1
                _say(f"Restarting the run ({restart} of {self.max_restarts}).")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _exit_code(self, code: int) -> int:
        """A process's exit code, changed to that of the signal that the launcher received, not the forwarded one."""
        if self._stop is not None and code == 128 + PASSED_ON[self._stop]:
            return 128 + self._stop
        return code

    def _run_once(self, restart: int) -> int:
        self._processes = []
        self._secret = secrets.token_hex(32)
        self._pipe = LauncherPipe()
        readers = []
        try:
            for number in range(self.num_processes):
                process = self._start(number, restart)
                self._processes.append(process)
                if self._stop is not None:  # the signal arrived between two starts
                    process.send_signal(PASSED_ON[self._stop])
                for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                    assert source is not None
                    readers.append(threading.Thread(target=_prefix, args=(number, source, target), daemon=True))
                    readers[-1].start()
            code = self._wait()
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            self._pipe.close()
        for reader in readers:
            reader.join(timeout=5)
        for process in self._processes:
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
        return code

    def _start(self, number: int, restart: int) -> "subprocess.Popen[str]":
        environment = os.environ | dict(self.environment) | self._pipe.environment
        environment |= {"PYTHONUNBUFFERED": "1", VARIABLE: self._secret}
        return subprocess.Popen(
            self.command(number, restart),
            env=environment | gpus_of(number, self.num_processes, environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # A signal from the terminal reaches only the launcher, which forwards it once.
            start_new_session=True,
            pass_fds=(self._pipe.reader, self._pipe.guarded_writer),
        )

    def _wait(self) -> int:
        """Waits for all. After one fails, kills the others if they do not end within `seconds_to_end`."""
        first_failure: tuple[int, int] | None = None
        deadline = until_joined = float("inf")
        while running := [p for p in self._processes if p.poll() is None]:
            if first_failure is None:
                first_failure = self._failure()
                if first_failure is not None:
                    number, code = first_failure
                    deadline = time.monotonic() + self.seconds_to_end
                    until_joined = time.monotonic() + SECONDS_TO_JOIN
                    if self._stop is None:
                        _say(f"Process {number} ended with exit code {code}; waiting for the others to end.")
            if time.monotonic() > until_joined:
                self._end_joining(running)
                until_joined = float("inf")
            if time.monotonic() > deadline:
                left = [number for number, p in enumerate(self._processes) if p in running]
                _say(f"Ending process{'es' if len(left) > 1 else ''} {', '.join(map(str, left))} by SIGKILL.")
                for process in running:
                    process.kill()
                deadline = float("inf")
            time.sleep(POLL_SECONDS)
        first_failure = first_failure or self._failure()
        return 0 if first_failure is None else first_failure[1]

    def _end_joining(self, running: Sequence["subprocess.Popen[str]"]) -> None:
        """Ends processes that are still joining, which can no longer succeed."""
        guarded = self._pipe.guarded()
        waiting = [n for n, process in enumerate(self._processes) if process in running and n not in guarded]
        if waiting:
            _say(f"Ending process{'es' if len(waiting) > 1 else ''} {', '.join(map(str, waiting))}, not yet joined.")
        for number in waiting:
            self._processes[number].terminate()

    def _failure(self) -> tuple[int, int] | None:
        """A process that has failed, with its exit code in a shell's notation."""
        codes = [(number, process.poll()) for number, process in enumerate(self._processes)]
        failed = [(number, code) for number, code in codes if code]
        # A process ended by a signal is not the cause if another failed with an exit code.
        failed.sort(key=lambda pair: pair[1] < 0)
        return next(((number, 128 - code if code < 0 else code) for number, code in failed), None)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stop = signal.Signals(number)
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(PASSED_ON[self._stop])


def gpus_of(number: int, num_processes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variable that assigns a process its NVIDIA GPUs of this machine, if there are any.

    All processes get equally many consecutive GPUs, and some may be left over. With fewer GPUs than processes, several
    processes share each. Empty if the environment already assigns GPUs.
    """
    count = _count_gpus(environment)
    if count == 0:
        return {}
    each = count // num_processes
    own = range(number * each, (number + 1) * each) if each else [number % count]
    return {"JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own))}


def _count_gpus(environment: Mapping[str, str]) -> int:
    """GPUs to divide among the processes; 0 if JAX cannot or must not use them, or already has its own assigned."""
    if environment.get("JAX_PLATFORMS") == "cpu" or "JAX_LOCAL_DEVICE_IDS" in environment or not _has_plugin():
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(list(NVIDIA_GPUS.glob("*")))
    # CUDA ignores the list from its first invalid entry on.
    return len(list(itertools.takewhile(lambda gpu: gpu and gpu[0] != "-" and gpu != "NoDevFiles", visible.split(","))))


def _has_plugin() -> bool:
    """Whether JAX is installed with an accelerator plugin."""
    return find_spec("jax_plugins") is not None


def free_port(address: str = "127.0.0.1") -> int:
    """A free port at an address of this machine.

    Raises `ValueError` if this machine does not have the address.
    """
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ValueError(
                f"--address must be an IPv4 address or a name of this machine. Got {address!r}: {error.strerror}. "
                "Leave it out to use 127.0.0.1."
            ) from error
        return int(probe.getsockname()[1])


def _prefix(number: int, source: Iterable[str], target: Any) -> None:
    """Copies lines, prefixed with the number of their process, in its colour on a terminal."""
    console = Console(file=target, highlight=False, soft_wrap=True)
    prefix = Text(f"[{number}] ", style=COLOURS[number % len(COLOURS)])
    for line in source:
        console.print(prefix + Text(printable(line.rstrip("\n"))))


def _say(text: str) -> None:
    print(f"meshpipe launch: {text}", file=sys.stderr, flush=True)
