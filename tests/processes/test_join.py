"""Joining the processes of a run, and stopping them after the same step."""

import signal
import socket
import subprocess
import sys

import pytest
from waiting import LONG

from meshpipe.processes import stop_together as stop_module
from meshpipe.processes.config import DistributedConfig, in_cluster
from meshpipe.processes.join import join
from meshpipe.processes.stop import StopRequest
from meshpipe.processes.stop_together import StopTogether


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "a:1"}, "must be given together"),
        ({"process_id": 0}, "must be given together"),
        ({"coordinator": "nowhere", "process_id": 0, "process_count": 2}, "must be HOST:PORT"),
        ({"coordinator": "a:70000", "process_id": 0, "process_count": 2}, "must be HOST:PORT"),
        ({"coordinator": "a:1", "process_id": 2, "process_count": 2}, "below `process_count`. Got 2 of 2"),
        ({"step_timeout": -1.0}, "`step_timeout` must be a number of at least 0"),
        ({"coordinator": "0.0.0.0:1", "process_id": 0, "process_count": 2}, "one network interface .* Got 0.0.0.0"),
        ({"coordinator": "[::]:1", "process_id": 1, "process_count": 2}, "pass `allow_any_address`"),
    ],
)
def test_invalid_settings_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedConfig(**given)  # type: ignore[arg-type]


def test_process_0_reports_a_port_in_use() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        for address in (f"127.0.0.1:{other.getsockname()[1]}", "192.0.2.1:4321", "no-such-host.invalid:4321"):
            with pytest.raises(ConnectionError, match=rf"listen at --coordinator. Got {address}: "):
                join(DistributedConfig(coordinator=address, process_id=0, process_count=2))


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # a shell in an allocation, without srun
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
    ],
)
def test_jobs_of_several_tasks_are_recognised(environment: dict[str, str], several: bool) -> None:
    assert in_cluster(environment) == several


def test_one_process_stops_on_a_signal() -> None:
    request = StopRequest()
    together = StopTogether(request)
    assert not together.after(3)
    request.signal = signal.SIGTERM
    assert together.after(3)


def test_several_processes_stop_after_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes one step behind or ahead of the one with the signal take the same number of steps."""
    told: dict[str, str] = {}

    def set_key(key: str, text: str) -> None:
        if key in told:
            raise RuntimeError("ALREADY_EXISTS")
        told[key] = text

    for name, replacement in {"process_count": lambda: 3, "set_key": set_key, "try_get_key": told.get}.items():
        monkeypatch.setattr(stop_module, name, replacement)
    requests = [StopRequest() for _ in range(3)]
    processes = [StopTogether(request) for request in requests]
    assert not any(process.after(step) for process, step in zip(processes, (4, 5, 6), strict=True))
    requests[1].signal = signal.SIGTERM
    requests[2].signal = signal.SIGINT
    steps = [4, 5, 6]
    assert not processes[1].after(5)
    for index, process in enumerate(processes):
        while not process.after(steps[index]):
            steps[index] += 1
    assert steps == [7, 7, 7]
    assert all(request.signal == signal.SIGTERM for request in requests)


def test_a_process_reports_that_the_others_did_not_join() -> None:
    """By a clock on which a second has passed whenever it is looked at: twice before each message."""
    script = """
import itertools, types
from meshpipe.processes import join
from meshpipe.processes.config import DistributedConfig, in_cluster
from meshpipe.processes.launch import free_port
join.JOIN_SECONDS, join.REMINDER_SECONDS = 6.0, 0.01
join.time = types.SimpleNamespace(monotonic=itertools.count(0.0).__next__)
join.join(DistributedConfig(coordinator=f"127.0.0.1:{free_port()}", process_id=0, process_count=2))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LONG)
    assert ended.returncode == 1, ended
    assert ended.stderr.count("process 0 is waiting for 1 of 2 processes to join at 127.0.0.1:") == 2, ended
    assert "process 0 stops because not all 2 processes of the run joined at 127.0.0.1:" in ended.stderr
