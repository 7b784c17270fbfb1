"""Accelerators are found by files and variables of a made-up machine, and the remedy fits what is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meshpipe.accelerators import ANSWERS, NVIDIA, TPU, Accelerator, find_accelerators, hidden_by, quiet_libtpu, remedy

CPU_ONLY = {"jax": "0.10.2", "jaxlib": "0.10.2"}


def make(root: Path, files: dict[str, str]) -> Path:
    """A file system with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
        (root / name).chmod(0o755)
    return root


def driver(version: str) -> dict[str, str]:
    line = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Sat Aug 19 01:15:15 UTC 2023\nGCC version:\n"
    return {"proc/driver/nvidia/version": line}


def pci(vendor: str, device: str) -> dict[str, str]:
    folder = "sys/bus/pci/devices/0000:00:05.0"
    return {f"{folder}/vendor": f"{vendor}\n", f"{folder}/device": f"{device}\n"}


def test_a_machine_without_any(tmp_path: Path) -> None:
    assert find_accelerators(tmp_path, {}) == []
    assert find_accelerators(tmp_path, {"PATH": "/usr/bin:/bin"}) == []


def test_nvidia_gpus_by_their_devices(tmp_path: Path) -> None:
    root = make(tmp_path, {"dev/nvidia0": "", "dev/nvidia1": "", "dev/nvidiactl": "", **driver("535.104.05")})
    assert find_accelerators(root, {}) == [
        Accelerator(kind=NVIDIA, found=("/dev/nvidia0", "/dev/nvidia1"), driver="535.104.05")
    ]


def test_an_open_kernel_module_has_a_version_too(tmp_path: Path) -> None:
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n"
    root = make(tmp_path, {"dev/nvidia0": "", "proc/driver/nvidia/version": text})
    assert find_accelerators(root, {})[0].driver == "580.65.06"


@pytest.mark.parametrize(
    ("files", "environment", "found"),
    [
        ({"proc/driver/nvidia/gpus/0000:01:00.0/information": ""}, {}, "/proc/driver/nvidia/gpus/0000:01:00.0"),
        ({"usr/lib/wsl/lib/nvidia-smi": ""}, {"PATH": "/bin:/usr/lib/wsl/lib"}, "/usr/lib/wsl/lib/nvidia-smi"),
    ],
)
def test_an_nvidia_gpu_without_its_device(
    tmp_path: Path, files: dict[str, str], environment: dict[str, str], found: str
) -> None:
    assert find_accelerators(make(tmp_path, files), environment) == [Accelerator(kind=NVIDIA, found=(found,))]


@pytest.mark.parametrize(
    ("files", "environment", "found"),
    [
        ({"dev/accel0": "", "dev/accel1": ""}, {}, ("/dev/accel0", "/dev/accel1")),
        ({"dev/vfio/0": "", "dev/vfio/vfio": "", **pci("0x1ae0", "0x0063")}, {}, ("/dev/vfio/0",)),
        (pci("0x1ae0", "0x0063"), {}, ("/sys/bus/pci/devices/0000:00:05.0",)),
        ({}, {"TPU_NAME": "mine"}, ("TPU_NAME=mine",)),
    ],
)
def test_tpus(tmp_path: Path, files: dict[str, str], environment: dict[str, str], found: tuple[str, ...]) -> None:
    assert find_accelerators(make(tmp_path, files), environment) == [Accelerator(kind=TPU, found=found)]


@pytest.mark.parametrize(
    "files",
    [
        {"dev/vfio/0": "", **pci("0x8086", "0x1237")},  # given to a virtual machine
        pci("0x1ae0", "0x0042"),  # Google's network card
        {"dev/accel/accel0": ""},  # an accelerator of another maker
    ],
)
def test_what_is_no_tpu(tmp_path: Path, files: dict[str, str]) -> None:
    assert find_accelerators(make(tmp_path, files), {"TPU_NAME": ""}) == []


def nvidia(version: str | None) -> Accelerator:
    return Accelerator(kind=NVIDIA, found=("/dev/nvidia0",), driver=version)


@pytest.mark.parametrize(
    ("version", "installed", "environment", "says"),
    [
        ("535.104.05", CPU_ONLY, {}, 'Install JAX\'s support: pip install "jax[cuda12]==0.10.2"'),
        ("580.65.06", CPU_ONLY, {}, 'pip install "jax[cuda13]==0.10.2"'),
        (None, CPU_ONLY, {}, 'pip install "jax[cuda12]==0.10.2"'),
        ("470.1", CPU_ONLY, {}, "Update the driver."),
        (
            "580.1",
            CPU_ONLY | {"jax-cuda13-plugin": "0.9.1"},
            {},
            'as one: pip install "jax[cuda13]==0.10.2"',
        ),
        ("580.1", CPU_ONLY | {"jaxlib": "0.10.2.1", "jax-cuda13-plugin": "0.10.2"}, {}, "does not start"),
        (
            "535.1",
            CPU_ONLY | {"jax-cuda13-plugin": "0.10.2"},
            {},
            'jax-cuda13-pjrt, then pip install "jax[cuda12]==0.10.2"',
        ),
        ("580.1", CPU_ONLY | {"jax-cuda13-plugin": "0.10.2"}, {"LD_LIBRARY_PATH": "/usr/lib"}, "try without it"),
        ("580.1", CPU_ONLY, {"JAX_PLATFORMS": "cpu"}, "The environment has JAX_PLATFORMS=cpu, which hides it"),
        ("580.1", CPU_ONLY, {"JAX_PLATFORMS": "cuda,cpu"}, "Install JAX's support"),
        ("580.1", CPU_ONLY, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES="),
        ("580.1", CPU_ONLY, {"CUDA_VISIBLE_DEVICES": "0"}, "Install JAX's support"),
    ],
)
def test_remedies_for_an_nvidia_gpu(
    version: str | None, installed: dict[str, str], environment: dict[str, str], says: str
) -> None:
    assert says in remedy(nvidia(version), installed, environment)


def test_remedies_for_a_tpu() -> None:
    tpu = Accelerator(kind=TPU, found=("/dev/accel0",))
    assert remedy(tpu, CPU_ONLY, {}) == 'Install JAX\'s support: pip install "jax[tpu]==0.10.2"'
    assert "Another process may hold the TPU" in remedy(tpu, CPU_ONLY | {"libtpu": "0.0.42"}, {})
    assert hidden_by(tpu, {"JAX_PLATFORMS": "cuda"}) == "JAX_PLATFORMS=cuda"
    assert hidden_by(tpu, {"JAX_PLATFORMS": "tpu,cpu", "CUDA_VISIBLE_DEVICES": ""}) is None


def test_libtpu_is_answered_only_where_there_is_nothing_that_the_answers_could_hide(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    environment: dict[str, str] = {}
    quiet_libtpu(tmp_path, environment)
    assert environment.items() >= ANSWERS.items()
    assert find_accelerators(tmp_path, environment) == []  # the answers do not look like a TPU
    for root, given in (
        (make(tmp_path / "tpu", {"dev/accel0": ""}), {}),
        (make(tmp_path / "gpu", {"dev/nvidia0": ""}), {}),
        (tmp_path, {"SLURM_JOB_ID": "1"}),
        (tmp_path, {"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}),
    ):
        environment = dict(given)
        quiet_libtpu(root, environment)
        assert not environment.keys() & ANSWERS.keys() - given.keys()
    own = {"TPU_WORKER_ID": "7"}
    quiet_libtpu(make(tmp_path / "gpu", {"dev/nvidia0": ""}), own, gpu=True)
    assert own == {**ANSWERS, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_ID": "7"}


def test_jax_says_nothing_about_tpus_on_a_machine_without(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_"))}
    program = "import meshpipe, jax; meshpipe.use_cpu_devices(2); print(len(jax.devices()))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("2\n", "")
