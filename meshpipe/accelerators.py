"""Accelerators of this machine, found without JAX: by files of their drivers, the PCI bus and the environment."""

import importlib.util
import os
import re
import shutil
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

NVIDIA = "NVIDIA GPU"
TPU = "TPU"

_GOOGLE = "0x1ae0"
_TPU_DEVICES = {"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"}
"""PCI identifiers of Google's TPUs. Other devices of that vendor are in all of its virtual machines."""
_TPU_VARIABLES = ("TPU_NAME", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
_CLUSTER_VARIABLES = ("SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE")

ANSWERS: Mapping[str, str] = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
"""What libtpu, the compiler for TPUs, asks the environment for. Where nothing answers, it waits and writes warnings."""


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """Accelerators of one kind."""

    kind: str
    """`NVIDIA GPU` or `TPU`."""
    found: tuple[str, ...]
    """What shows that they are here: files, a program, or environment variables."""
    driver: str | None = None
    """Version of the NVIDIA driver, where its file can be read."""


def find_accelerators(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> list[Accelerator]:
    """The accelerators of the machine whose file system begins at `root`, whatever JAX sees of them."""
    found = []
    if nvidia := _nvidia(root, environment):
        found.append(Accelerator(kind=NVIDIA, found=nvidia, driver=_nvidia_driver(root)))
    if tpu := _tpu(root, environment):
        found.append(Accelerator(kind=TPU, found=tpu))
    return found


def _nvidia(root: Path, environment: Mapping[str, str]) -> tuple[str, ...]:
    devices = sorted((root / "dev").glob("nvidia[0-9]*")) or sorted((root / "proc/driver/nvidia/gpus").glob("*"))
    # Windows Subsystem for Linux has neither, and puts the tool on the path.
    tool = [] if devices else _tool("nvidia-smi", root, environment)
    return tuple(_name(path, root) for path in devices or tool)


def _nvidia_driver(root: Path) -> str | None:
    version = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", _read(root / "proc/driver/nvidia/version"))
    return version[0] if version else None


def _tpu(root: Path, environment: Mapping[str, str]) -> tuple[str, ...]:
    devices = [_name(path, root) for path in sorted((root / "dev").glob("accel[0-9]*"))]
    if not devices:
        on_bus = [path for path in sorted((root / "sys/bus/pci/devices").glob("*")) if _is_tpu(path)]
        devices = [_name(path, root) for path in sorted((root / "dev/vfio").glob("[0-9]*"))] if on_bus else []
        devices = devices or [_name(path, root) for path in on_bus]
    told = [name for name in _TPU_VARIABLES if environment.get(name, "") not in ("", ANSWERS.get(name))]
    return tuple(devices or [f"{name}={environment[name]}" for name in told])


def quiet_libtpu(
    root: Path = Path("/"), environment: MutableMapping[str, str] = os.environ, *, gpu: bool = False
) -> None:
    """On a machine without a TPU where libtpu is installed, to compile for TPUs, answers what it asks for.

    With a GPU, JAX's detection of clusters might take the answers for those of a TPU machine: then only with `gpu`.
    """
    if importlib.util.find_spec("libtpu") is None or any(environment.get(name) for name in _CLUSTER_VARIABLES):
        return
    kinds = {accelerator.kind for accelerator in find_accelerators(root, environment)}
    # It refuses a second process otherwise, even where neither uses a TPU.
    if TPU not in kinds:
        environment.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if not kinds or (gpu and kinds == {NVIDIA}):
        for name, value in ANSWERS.items():
            environment.setdefault(name, value)


def _is_tpu(device: Path) -> bool:
    return _read(device / "vendor").strip() == _GOOGLE and _read(device / "device").strip() in _TPU_DEVICES


def _tool(name: str, root: Path, environment: Mapping[str, str]) -> list[Path]:
    folders = [str(root / folder.lstrip("/")) for folder in environment.get("PATH", "").split(os.pathsep) if folder]
    path = shutil.which(name, path=os.pathsep.join(folders)) if folders else None
    return [Path(path)] if path else []


def _name(path: Path, root: Path) -> str:
    return f"/{path.relative_to(root)}"


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def hidden_by(accelerator: Accelerator, environment: Mapping[str, str] = os.environ) -> str | None:
    """The environment variable, with its value, that keeps JAX from the accelerator; None if there is none."""
    names = {"cuda", "gpu"} if accelerator.kind == NVIDIA else {"tpu"}
    for variable in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        value = environment.get(variable, "")
        if value and not names & set(value.split(",")):
            return f"{variable}={value}"
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if accelerator.kind == NVIDIA and visible is not None and (not visible.strip() or visible.startswith("-")):
        return f"CUDA_VISIBLE_DEVICES={visible}"
    return None


def remedy(accelerator: Accelerator, installed: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> str:
    """What to do so that JAX sees the accelerator, in a sentence or two.

    `installed` has the versions of `jax`, `jaxlib` and JAX's plugins, by package.
    """
    if hidden := hidden_by(accelerator, environment):
        return f"The environment has {hidden}, which hides it from JAX. Unset that variable to use it."
    if accelerator.kind == NVIDIA:
        return _remedy_of_nvidia(accelerator.driver, installed, environment)
    if "libtpu" in installed:
        return "libtpu is installed and does not start. Another process may hold the TPU: it serves one at a time."
    return f"Install JAX's support: {_install('tpu', installed)}"


def _remedy_of_nvidia(driver: str | None, installed: Mapping[str, str], environment: Mapping[str, str]) -> str:
    number = int(driver.partition(".")[0]) if driver else None
    if number is not None and number < 525:
        return f"Its driver {driver} is too old: CUDA 12 needs 525 or newer, CUDA 13 needs 580. Update the driver."
    extra = "cuda13" if number is not None and number >= 580 else "cuda12"
    plugins = {name: version for name, version in installed.items() if re.fullmatch(r"jax-cuda\d+-plugin", name)}
    if not plugins:
        return f"Install JAX's support: {_install(extra, installed)}"
    name, version = sorted(plugins.items())[-1]
    if _three(version) != _three(installed.get("jaxlib", "")):
        wanted = name.split("-")[1]
        got = f"{name} {version} does not fit jaxlib {installed.get('jaxlib', '(not installed)')}."
        return f"{got} Install both as one: {_install(wanted, installed)}"
    if name == "jax-cuda13-plugin" and number is not None and number < 580:
        change = f"pip uninstall {name} jax-cuda13-pjrt, then {_install('cuda12', installed)}"
        return f"CUDA 13 needs driver 580 or newer, and this one is {driver}: {change}"
    if environment.get("LD_LIBRARY_PATH"):
        return f"{name} is installed and does not start. LD_LIBRARY_PATH may lead it to another CUDA: try without it."
    return f"{name} {version} is installed and does not start. `nvidia-smi` must list the GPU, also inside a container."


def _install(extra: str, installed: Mapping[str, str]) -> str:
    """The command for JAX's own extra, at the installed version, so that nothing else changes."""
    version = f"=={installed['jax']}" if "jax" in installed else ""
    return f'pip install "jax[{extra}]{version}"'


def _three(version: str) -> list[str]:
    return version.split(".")[:3]
