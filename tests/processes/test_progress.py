"""A stop gives up on a stuck step after a while, and names the processes that hold it up."""

import os
import signal
import time

import pytest

from meshpipe.processes import progress
from meshpipe.processes.progress import Progress, Steps, StopLimit
from meshpipe.processes.stop import StopRequest


def ended_with(at: Progress, others: dict[int, Steps], seconds: float) -> list[str]:
    said: list[str] = []
    with StopRequest(lambda message: None) as stop, StopLimit(at, stop, said.append, lambda: others):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
    return said


@pytest.fixture
def stuck() -> Progress:
    found = Progress(3)
    found.patience = 0.2
    return found


def test_the_stuck_step_is_named(stuck: Progress) -> None:
    (said,) = ended_with(stuck, {}, 1.0)
    assert said.startswith("SIGTERM asked to stop, and step 4 has made no progress for ")


def test_processes_that_are_behind_are_named(stuck: Progress) -> None:
    (said,) = ended_with(stuck, {0: Steps(5, 4), 1: Steps(4, 4), 2: Steps(4, 4)}, 1.0)
    assert said.endswith("; waiting for processes 1, 2, at step 4")
    (said,) = ended_with(stuck, {0: Steps(5, 4), 1: Steps(5, 4)}, 1.0)
    assert said.endswith("all processes have dispatched step 5 and completed step 4")


def test_a_save_may_take_its_time(stuck: Progress) -> None:
    with stuck.during("save"):
        assert ended_with(stuck, {}, 1.0) == []
    assert stuck.doing == "step"


def test_nothing_fails_without_a_signal(stuck: Progress) -> None:
    said: list[str] = []
    with StopRequest(lambda message: None) as stop, StopLimit(stuck, stop, said.append):
        time.sleep(1.0)
    assert said == []


def test_the_limit_grows_with_the_longest_step() -> None:
    at = Progress()
    assert at.patience == progress.FIRST_STEP_SECONDS
    at.completed(1, 100.0)
    at.completed(2, 1.0)
    assert at.patience == 300.0
    assert Steps.parse(str(at.steps)) == at.steps == Steps(0, 2)
