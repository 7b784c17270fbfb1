"""A stop gives up on a stuck step after a while, and names the processes that hold it up."""

import signal
import threading

import pytest
from waiting import wait_until

from meshpipe.processes import progress
from meshpipe.processes.progress import Progress, Steps, StopLimit
from meshpipe.processes.stop import StopRequest


class Looks(threading.Event):
    """Counts how often it was looked whether the stop takes too long."""

    count = -1

    def wait(self, timeout: float | None = None) -> bool:
        self.count += 1
        return super().wait(timeout)


def said(at: Progress, others: dict[int, Steps] | None = None, number: int | None = signal.SIGTERM) -> list[str]:
    """What it fails with, if it does so at the third look at the latest."""
    found: list[str] = []
    with StopRequest(lambda message: None) as stop:
        limit = StopLimit(at, stop, found.append, lambda: others or {})
        limit._done = looks = Looks()
        if number is not None:
            signal.raise_signal(number)
            wait_until(lambda: stop)
        with limit:
            wait_until(lambda: looks.count >= 3 or found)
    return found


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Progress:
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    found = Progress(3)
    found.patience = 0.0
    return found


def test_the_stuck_step_is_named(stuck: Progress) -> None:
    (message,) = said(stuck)
    assert message.startswith("SIGTERM asked to stop, and step 4 has made no progress for ")


def test_processes_that_are_behind_are_named(stuck: Progress) -> None:
    (message,) = said(stuck, {0: Steps(5, 4), 1: Steps(4, 4), 2: Steps(4, 4)})
    assert message.endswith("; waiting for processes 1, 2, at step 4")
    (message,) = said(stuck, {0: Steps(5, 4), 1: Steps(5, 4)})
    assert message.endswith("all processes have dispatched step 5 and completed step 4")


def test_a_step_may_take_its_time(stuck: Progress) -> None:
    stuck.patience = 1000.0
    assert said(stuck) == []


def test_a_save_may_take_its_time(stuck: Progress) -> None:
    with stuck.during("save"):
        assert said(stuck) == []
    assert stuck.doing == "step"


def test_nothing_fails_without_a_signal(stuck: Progress) -> None:
    assert said(stuck, number=None) == []


def test_the_limit_grows_with_the_longest_step() -> None:
    at = Progress()
    assert at.patience == progress.FIRST_STEP_SECONDS
    at.completed(1, 100.0)
    at.completed(2, 1.0)
    assert at.patience == 300.0
    assert Steps.parse(str(at.steps)) == at.steps == Steps(0, 2)
