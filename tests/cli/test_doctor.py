"""`meshpipe doctor` on this machine and on made-up ones; `train` names devices that JAX does not see."""

import io
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import pytest
from rich.console import Console
from tiny_recipes import single
from waiting import LONG, wait_until

from meshpipe.accelerators import NVIDIA, Accelerator, find_accelerators
from meshpipe.cli import doctor, main
from meshpipe.cli.devices import take_devices, tell_of_idle
from meshpipe.cli.doctor import examine, problems
from meshpipe.cli.probe import Probe, probe_devices
from meshpipe.version import __version__

CPU = Probe(devices=({"platform": "cpu", "kind": "cpu", "memory": None},))
INSTALLED = {"jax": "0.10.2", "jaxlib": "0.10.2"}
GPU = Accelerator(kind=NVIDIA, found=("/dev/nvidia0",), driver="580.65.06")


def a_jax(folder: Path, source: str) -> dict[str, str]:
    """The environment of a process in which `import jax` runs this source instead."""
    (folder / "jax.py").write_text(source)
    return os.environ | {"PYTHONPATH": str(folder)}


def make_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=120, highlight=False, soft_wrap=True), text


@pytest.fixture(autouse=True)
def _started() -> None:
    """Commands called in this process take devices only before JAX has started."""
    assert jax.device_count() == 8


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["meshpipe"].startswith(f"{__version__}, ")
    assert "jaxlib " in lines["packages"]
    assert " core" in lines["system"]
    assert "cpu device" in lines["JAX"]
    assert "JAX_PLATFORMS=cpu" in lines["variables"]
    assert (code == 0) == ("Nothing" in lines)


def test_a_gpu_that_jax_does_not_see(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    console, text = make_console()
    without = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "NPROC")}
    assert examine(console, timeout=LONG, root=tmp_path, environment=without) == 1
    assert "hardware   NVIDIA GPU (/dev/nvidia0)\n" in text.getvalue()
    wanted = "Problem: This machine has an NVIDIA GPU (/dev/nvidia0), but JAX sees none. Install JAX's support: pip "
    assert wanted in text.getvalue()
    assert len(text.getvalue().splitlines()) < 24


def test_a_secret_is_not_printed(tmp_path: Path) -> None:
    console, text = make_console()
    fake = a_jax(tmp_path, "def devices():\n    return []\n") | {"MESHPIPE_SECRET": "do-not-tell", "XLA_FLAGS": "--x"}
    examine(console, timeout=LONG, root=tmp_path, environment=fake)
    assert "MESHPIPE_SECRET=(set) " in text.getvalue()
    assert "XLA_FLAGS=--x" in text.getvalue()
    assert "do-not-tell" not in text.getvalue()


def test_devices_that_hang(tmp_path: Path) -> None:
    hanging = a_jax(tmp_path, "import time\n\ndef devices():\n    time.sleep(1000)\n")
    start = time.monotonic()
    probe = probe_devices(1.0, hanging)
    assert time.monotonic() - start < LONG
    assert probe.error == "JAX did not start its devices within 1 s."
    found = problems(probe, [GPU], INSTALLED, [], {})
    assert "Another process may hold the device" in found[0]
    found = problems(probe, [], INSTALLED, [], {"JAX_PLATFORMS": "cuda"})
    assert "JAX_PLATFORMS=cuda allows no other platform: unset it" in found[0]


def test_waiting_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console, text = make_console()
    hanging = a_jax(tmp_path, "import time\n\ndef devices():\n    time.sleep(1000)\n")
    error = io.StringIO()

    def probe(timeout: float, environment: Mapping[str, str]) -> Probe:
        wait_until(lambda: "JAX starts its devices, which may take 1 s ...\n" in error.getvalue())
        return probe_devices(timeout, environment)

    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setattr(doctor, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(doctor, "probe_devices", probe)
    assert examine(console, timeout=1.0, root=tmp_path, environment=hanging) == 1
    assert "Problem: JAX did not start its devices within 1 s." in text.getvalue()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no such driver')", "RuntimeError: no such driver"),
        ("import os\nos.write(2, b'the driver has crashed')\nos.abort()", "the driver has crashed"),
    ],
)
def test_devices_that_crash(tmp_path: Path, source: str, said: str) -> None:
    console, text = make_console()
    assert examine(console, timeout=LONG, root=tmp_path, environment=a_jax(tmp_path, source)) == 1
    assert "JAX sees   nothing\n" in text.getvalue()
    assert "Problem: JAX did not start its devices (exit code " in text.getvalue()
    assert f"  JAX: {said}" in text.getvalue()


def test_accelerators_that_jax_sees(tmp_path: Path) -> None:
    source = """
class Device:
    platform, device_kind = "gpu", "NVIDIA H100"

    def memory_stats(self):
        return {"bytes_limit": 60_000_000_000}


def devices():
    return [Device(), Device()]
"""
    probe = probe_devices(LONG, a_jax(tmp_path, source))
    assert probe.platforms == {"gpu"}
    assert problems(probe, [GPU], INSTALLED, [], {}) == []
    console, text = make_console()
    assert examine(console, timeout=LONG, root=tmp_path, environment=a_jax(tmp_path, source)) == 0
    assert "JAX sees   2 gpu devices (NVIDIA H100 of 60 GB); started in " in text.getvalue()


def test_settings_that_do_not_suit() -> None:
    found = problems(CPU, [], INSTALLED, ["jax_disable_jit=True"], {"NPROC": "1"})
    assert found[0] == "The JAX setting jax_disable_jit=True keeps a trainer from working. Unset it."
    assert found[1].startswith("NPROC=1 limits XLA's threads, so ")


@pytest.mark.parametrize("timeout", ["0", "nan", "1e9", "soon"])
def test_wrong_timeouts(timeout: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--timeout", timeout]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_train_names_a_gpu_that_jax_does_not_see() -> None:
    console, text = make_console()
    take_devices(single().mesh, console, [GPU], {})
    first, second = text.getvalue().splitlines()
    assert first.startswith(
        "JAX does not see the NVIDIA GPU of this machine (/dev/nvidia0). Install JAX's support: pip"
    )
    assert second == "No accelerator: running on 1 virtual CPU device."


def test_train_tells_of_devices_that_a_mesh_leaves_idle() -> None:
    console, text = make_console()
    tell_of_idle(console, 8, jax.devices())
    tell_of_idle(console, 2, jax.devices())
    assert text.getvalue().startswith("6 of the 8 cpu devices are idle: the mesh has 2. --mesh.data, ")


def test_train_is_silent_about_a_gpu_that_the_user_has_hidden(tmp_path: Path) -> None:
    console, text = make_console()
    take_devices(single().mesh, console, [GPU], {"JAX_PLATFORMS": "cpu"})
    take_devices(single().mesh, console, find_accelerators(tmp_path, {}), {})
    assert text.getvalue() == "No accelerator: running on 1 virtual CPU device.\n" * 2
