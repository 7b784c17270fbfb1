"""The first signal is a request to stop; the previous handlers are restored."""

import os
import queue
import signal
import subprocess
import sys
import threading

import pytest
from waiting import LONG, has_signal, wait_until

from meshpipe.processes.stop import SECONDS_TO_END, StopRequest


def send(number: int, stop: StopRequest) -> None:
    os.kill(os.getpid(), number)
    wait_until(lambda: stop)


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
        signal.raise_signal(signal.SIGTERM)
    assert stop.exit_status == 130  # and by now it has read both


def test_handlers_are_restored_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), StopRequest():
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_a_hangup_ignored_by_nohup_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(lambda message: None) as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop  # and by now it has read whatever came
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_before_the_first_step_a_signal_ends_at_once() -> None:
    ended = queue.Queue[signal.Signals]()
    with StopRequest(lambda message: None, end_early=ended.put) as stop:
        send(signal.SIGTERM, stop)
        assert ended.get(timeout=LONG) == signal.SIGTERM  # from another thread


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
import ctypes, signal, sys, time
from meshpipe.processes import stop as module
from meshpipe.processes.stop import StopRequest, leave_now

def listens():
    print("listening", flush=True)

def listens_with_the_lock():
    mutex, library = ctypes.create_string_buffer(64), ctypes.PyDLL(None)
    lock, write = library.pthread_mutex_lock, library.write
    sys.setswitchinterval(1000)  # from here on, no other thread gets the interpreter's lock
    write(1, b"listening\\n", 10)
    lock(mutex)
    lock(mutex)  # waits for ever

def waits(received):
    time.sleep(1000)
"""


def start(*lines: str) -> "subprocess.Popen[str]":
    """A process that has said that it listens."""
    program = "\n".join((BEGIN, *lines))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    return process


def says(process: "subprocess.Popen[str]") -> str:
    """The next line of its standard error."""
    assert process.stderr is not None
    return process.stderr.readline()


def exit_code(process: "subprocess.Popen[str]") -> int:
    try:
        return process.wait(LONG)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_process_in_which_no_python_runs(number: signal.Signals) -> None:
    """As in one whose memory is full, or that is inside a call that never lets go of the interpreter's lock."""
    process = start("stop = StopRequest(end_early=leave_now).__enter__()", "listens_with_the_lock()")
    process.send_signal(number)
    # The first has been delivered once the handler is gone, which is for one delivery.
    wait_until(lambda: not has_signal(process.pid, number, "SigCgt"))
    assert process.poll() is None
    process.send_signal(number)
    assert exit_code(process) == -number


def test_a_second_signal_ends_a_process_whose_end_hangs() -> None:
    enters = "stop = StopRequest(end_early=waits).__enter__()"
    process = start("module.SECONDS_TO_END = 1000", enters, "listens(); time.sleep(1000)")
    process.send_signal(signal.SIGTERM)
    assert says(process) == "SIGTERM: stopped.\n"
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert exit_code(process) == 129


def test_an_end_that_hangs_takes_less_than_two_seconds() -> None:
    process = start("stop = StopRequest(end_early=waits).__enter__()", "listens(); time.sleep(1000)")
    process.send_signal(signal.SIGTERM)
    assert exit_code(process) == 143
    assert SECONDS_TO_END < 2  # after which a timer ends it, a moment later where the machine is idle


def test_once_steps_run_sigterm_never_ends_at_once() -> None:
    enters = "stop = StopRequest(end_early=leave_now).__enter__(); stop.begin_steps()"
    process = start(enters, "listens(); time.sleep(1000)")
    for number in range(3):
        process.send_signal(signal.SIGTERM)
        if number == 0:
            assert says(process).startswith("SIGTERM: stopping after the step in progress.")
        wait_until(lambda: not has_signal(process.pid, signal.SIGTERM, "ShdPnd"))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert exit_code(process) == 130
