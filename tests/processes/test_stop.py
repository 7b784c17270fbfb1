"""The first signal is a request to stop; the previous handlers are restored."""

import os
import signal
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
    ended: list[signal.Signals] = []
    with StopRequest(lambda message: None, end_early=ended.append) as stop:
        send(signal.SIGTERM, stop)
        assert ended == [signal.SIGTERM]
