"""The first signal is a request to stop; the previous handlers are restored."""

import os
import queue
import signal
import subprocess
import sys
import threading
import time

import pytest

from meshpipe.processes.stop import StopRequest


def send(number: int, stop: StopRequest) -> None:
    os.kill(os.getpid(), number)
    deadline = time.monotonic() + 10
    while not stop and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_recorded_and_reported(number: signal.Signals, status: int) -> None:
    said: list[str] = []
    before = signal.getsignal(number)
    with StopRequest(said.append) as stop:
        assert not stop
        send(number, stop)
        assert stop
        assert stop.exit_status == status
    assert said == [f"{number.name}: stopping after the step in progress. Press Ctrl-C to end at once."]
    assert signal.getsignal(number) is before


def test_the_first_signal_decides_the_status() -> None:
    with StopRequest(lambda message: None) as stop:
        send(signal.SIGINT, stop)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.exit_status == 130


def test_handlers_are_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_hangup_ignored_by_nohup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(lambda message: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_first_step_a_signal_ends_at_once() -> None:
    ended = queue.Queue[signal.Signals]()
    with StopRequest(lambda message: None, end_early=ended.put) as stop:
        send(signal.SIGTERM, stop)
        assert ended.get(timeout=60) == signal.SIGTERM  # from another thread


def test_outside_of_the_main_thread_no_signal_is_taken() -> None:
    before = signal.getsignal(signal.SIGTERM)
    entered: list[object] = []

    def enter() -> None:
        with StopRequest() as stop:
            entered.append((bool(stop), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [(False, before)]


BEGIN = """
import ctypes, signal, sys, threading, time
from meshpipe.processes.stop import StopRequest, leave_now
mutex = ctypes.create_string_buffer(64)
def holds_the_lock():
    for _ in range(2):  # the second call waits for ever, with the interpreter's lock
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
waits = lambda received: time.sleep(60)
"""


def start(*lines: str) -> "subprocess.Popen[str]":
    """A process that prints a line once it listens, before it does the last of the lines."""
    *first, last = lines
    program = "\n".join((BEGIN, *first, "print('listening', flush=True)", last))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def seconds_until_the_end(process: "subprocess.Popen[str]") -> float:
    started = time.monotonic()
    try:
        process.wait(20)
    finally:
        process.kill()
    return time.monotonic() - started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_in_which_no_python_runs(number: signal.Signals) -> None:
    """As in one whose memory is full, or that is inside a call that never lets go of the interpreter's lock."""
    process = start("stop = StopRequest(end_early=leave_now).__enter__()", "holds_the_lock()")
    process.send_signal(number)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(number)
    assert seconds_until_the_end(process) < 1
    assert process.returncode == -number


def test_a_second_signal_ends_a_process_whose_end_hangs() -> None:
    process = start("stop = StopRequest(end_early=waits).__enter__()", "time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert seconds_until_the_end(process) < 1
    assert process.returncode == 129


def test_an_end_that_hangs_takes_less_than_two_seconds() -> None:
    process = start("stop = StopRequest(end_early=waits).__enter__()", "time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    assert seconds_until_the_end(process) < 2.5
    assert process.returncode == 143


def test_once_steps_run_sigterm_never_ends_at_once() -> None:
    process = start("stop = StopRequest(end_early=leave_now).__enter__()", "stop.begin_steps(); time.sleep(60)")
    time.sleep(0.3)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert seconds_until_the_end(process) < 1
    assert process.returncode == 130
