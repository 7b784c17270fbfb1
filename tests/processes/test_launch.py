"""The processes of one run start and end together."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from waiting import LONG

from meshpipe.processes import launch as launch_module
from meshpipe.processes.launch import Launch, free_port, gpus_of


def script(text: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{text}"]


def launch(scripts: list[str], **options: float) -> int:
    return Launch(len(scripts), lambda number, restart: script(scripts[number]), **options).run()  # type: ignore[arg-type]


def test_output_names_its_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(["print('hello')", "print('there', file=sys.stderr)"]) == 0
    captured = capfd.readouterr()
    assert "[0] hello" in captured.out
    assert "[1] there" in captured.err


@pytest.mark.parametrize(
    ("gpus", "environment", "shares"),
    [
        (0, {}, [None, None]),
        (1, {}, ["0", "0"]),
        (2, {}, ["0", "1"]),
        (8, {}, ["0,1,2,3", "4,5,6,7"]),
        (8, {"CUDA_VISIBLE_DEVICES": "6,7"}, ["0", "1"]),
        (8, {"CUDA_VISIBLE_DEVICES": ""}, [None, None]),
        (8, {"CUDA_VISIBLE_DEVICES": "-1"}, [None, None]),
        (8, {"CUDA_VISIBLE_DEVICES": "5,3,-1,1"}, ["0", "1"]),
        (8, {"JAX_PLATFORMS": "cpu"}, [None, None]),
        (8, {"JAX_LOCAL_DEVICE_IDS": "3"}, [None, None]),
    ],
)
def test_gpus_are_divided_among_processes(
    gpus: int,
    environment: dict[str, str],
    shares: list[str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for gpu in range(gpus):
        (tmp_path / f"0000:0{gpu}:00.0").mkdir()
    monkeypatch.setattr(launch_module, "NVIDIA_GPUS", tmp_path)
    monkeypatch.setattr(launch_module, "_has_plugin", lambda: True)
    assert [gpus_of(number, 2, environment).get("JAX_LOCAL_DEVICE_IDS") for number in range(2)] == shares


def test_sharing_a_gpu_prints_the_required_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0000:00:00.0").mkdir()
    monkeypatch.setattr(launch_module, "NVIDIA_GPUS", tmp_path)
    monkeypatch.setattr(launch_module, "_has_plugin", lambda: True)
    for name in ("JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "JAX_LOCAL_DEVICE_IDS"):
        monkeypatch.delenv(name, raising=False)
    shows = "print(os.environ['JAX_LOCAL_DEVICE_IDS'])"
    assert launch([shows, shows]) == 0
    captured = capfd.readouterr()
    assert sorted(captured.out.split()) == ["0", "0", "[0]", "[1]"]
    assert "2 processes share 1 GPU" in captured.err
    assert "--transfers sockets" in captured.err


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of this machine\. Got '192\.0\.2\.1'"):
        free_port("192.0.2.1")


def test_the_first_failure_ends_all_and_is_the_result() -> None:
    begin = time.monotonic()
    assert launch(["time.sleep(1000)", "sys.exit(3)", "time.sleep(1000)"], seconds_to_end=0.3) == 3
    assert time.monotonic() - begin < LONG


def test_a_killed_process_has_the_exit_code_of_a_shell() -> None:
    assert launch(["os.kill(os.getpid(), signal.SIGKILL)"]) == 137


def test_others_may_end_by_themselves_after_a_failure(tmp_path: Path) -> None:
    there, done = (str(tmp_path / name) for name in ("there", "done"))
    fails = f"while not os.path.exists({there!r}): time.sleep(0.01)\nsys.exit(1)"
    ends = f"open({there!r}, 'w'); time.sleep(1); open({done!r}, 'w')"
    assert launch([ends, fails], seconds_to_end=LONG) == 1
    assert os.path.exists(done)


def test_a_failed_run_is_restarted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = "sys.exit(0 if int(sys.argv[1]) == 2 else 1)"
    assert Launch(2, lambda number, restart: [*script(text), str(restart)], max_restarts=3).run() == 0
    assert "Restarting the run (2 of 3)." in capfd.readouterr().err


@pytest.mark.parametrize(("code", "starts"), [(1, 3), (2, 1)])
def test_restarts_are_limited_and_invalid_requests_are_not_restarted(tmp_path: Path, code: int, starts: int) -> None:
    file = tmp_path / "starts"
    text = f"open({str(file)!r}, 'a').write('x'); sys.exit({code})"
    assert Launch(1, lambda number, restart: script(text), max_restarts=2).run() == code
    assert file.read_text() == "x" * starts


def test_a_signal_reaches_every_process_once(tmp_path: Path) -> None:
    child = f"""
import signal, sys, time
from pathlib import Path
count = 0
def handle(number, frame):
    global count
    count += 1
signal.signal(signal.SIGTERM, handle)
Path({str(tmp_path)!r}, sys.argv[1]).touch()
while not count:
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(143 if count == 1 else 1)
"""
    (tmp_path / "child.py").write_text(child)
    (tmp_path / "parent.py").write_text(
        f"""
import sys
from meshpipe.processes.launch import Launch
sys.exit(Launch(2, lambda n, restart: [sys.executable, {str(tmp_path / "child.py")!r}, str(n)], max_restarts=2).run())
"""
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment)
    timer = threading.Timer(LONG, parent.kill)
    timer.start()
    while not all((tmp_path / str(n)).exists() for n in range(2)) and parent.poll() is None:
        time.sleep(0.01)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait() == 143
    timer.cancel()
