"""`meshpipe doctor`: what a run finds on this machine, on one screen to paste into a report."""

import importlib.metadata
import json
import math
import os
import platform
import sys
import textwrap
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshpipe.accelerators import ANSWERS, TPU, Accelerator, find_accelerators, remedy
from meshpipe.cli.arguments import parse
from meshpipe.cli.probe import Probe, probe_devices
from meshpipe.errors import check_positive
from meshpipe.machine import host_memory, usable_cores
from meshpipe.processes.exit_codes import COMPLETED, FAILED

if TYPE_CHECKING:
    from rich.console import Console

MAX_TIMEOUT = 3600.0
QUIET_SECONDS = 2.0
"""How long starting the devices may take before a line says that it is going on."""
PREFIXES = ("JAX_", "XLA_", "CUDA_VISIBLE", "NVIDIA_VISIBLE", "TPU_", "LIBTPU", "MESHPIPE_", "LD_LIBRARY_PATH", "NPROC")
"""Beginnings of the names of environment variables that change how JAX or meshpipe runs."""
SECRET = "MESHPIPE_SECRET"
SET_BY_JAX = {"TPU_SKIP_MDS_QUERY", "TPU_ML_PLATFORM", "TPU_ML_PLATFORM_VERSION", "TPU_LIBRARY_PATH"}
"""Variables that importing JAX sets by itself."""


@dataclass(frozen=True)
class _DoctorFlags:
    timeout: float = 60.0
    """Seconds that JAX may take to start its devices."""

    def __post_init__(self) -> None:
        check_positive("timeout", self.timeout)
        if not self.timeout <= MAX_TIMEOUT:
            raise ValueError(f"--timeout must be at most {MAX_TIMEOUT:g} seconds. Got {self.timeout}.")


def doctor(arguments: list[str]) -> int:
    """Prints versions, machine and devices, and what keeps JAX from devices that are there; exit code 1 if anything
    does.
    """
    flags = parse(_DoctorFlags, arguments, "meshpipe doctor", "Shows versions, devices, and what is missing.")
    from meshpipe.report.tables import make_console

    return examine(make_console(), timeout=flags.timeout)


def examine(
    console: "Console", *, timeout: float, root: Path = Path("/"), environment: Mapping[str, str] = os.environ
) -> int:
    """Examines the machine whose file system begins at `root`, with these environment variables."""
    from meshpipe.environment import optional, plugins, unfit_libtpu, unfit_settings, versions

    installed = versions() | plugins()
    accelerators = find_accelerators(root, environment)
    _print(console, "meshpipe", f"{installed['meshpipe']}, {_origin()}")
    _print(console, "python", f"{installed['python']}, {sys.executable}")
    _print(console, "packages", _pairs(versions(), leave_out=("python", "meshpipe")))
    _print(console, "optional", _pairs(optional()))
    _print(console, "plugins", _pairs(plugins()) or "none: JAX uses CPUs")
    _print(console, "system", f"{platform.platform()}, {_machine(root)}")
    _print(console, "hardware", "; ".join(map(_describe, accelerators)) or "no NVIDIA GPU, no TPU")
    _print(console, "variables", _variables(environment) or "none that concern JAX")
    with _telling(console, f"JAX starts its devices, which may take {timeout:g} s ..."):
        probe = probe_devices(timeout, environment)
    _print(console, "JAX sees", _devices(probe))
    found = problems(probe, accelerators, installed, unfit_settings(), environment)
    found += filter(None, [unfit_libtpu()])
    for text in found:
        console.print(f"\nProblem: {text}", markup=False)
    if found:
        for line in probe.said:
            console.print(f"  JAX: {line}", markup=False)
        return FAILED
    console.print("\nNothing is missing.")
    return COMPLETED


@contextmanager
def _telling(console: "Console", what: str) -> Iterator[None]:
    """On a terminal, shows what is going on; elsewhere, says so on standard error once it takes long."""
    if console.is_terminal:
        with console.status(what):
            yield
        return
    timer = threading.Timer(QUIET_SECONDS, lambda: print(what, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def problems(
    probe: Probe,
    accelerators: list[Accelerator],
    installed: Mapping[str, str],
    unfit: list[str],
    environment: Mapping[str, str],
) -> list[str]:
    """What keeps JAX from devices, or a trainer from working, each with its remedy."""
    found = []
    seen = probe.platforms
    if probe.error:
        found.append(f"{probe.error} {_way_out(probe, accelerators, environment)}")
    for accelerator in accelerators:
        if not seen & ({"tpu"} if accelerator.kind == TPU else {"gpu", "cuda"}):
            unseen = f"This machine has {_article(accelerator)} ({accelerator.found[0]}), but JAX sees none."
            found.append(f"{unseen} {remedy(accelerator, installed, environment)}")
    found += [f"The JAX setting {setting} keeps a trainer from working. Unset it." for setting in unfit]
    threads = environment.get("NPROC", "")
    if threads.isdigit() and int(threads) < 2 * usable_cores():
        found.append(
            f"NPROC={threads} limits XLA's threads, so a run on several virtual CPU devices may hang. "
            "Unset NPROC: meshpipe sets it to what a run needs."
        )
    return found


def _way_out(probe: Probe, accelerators: list[Accelerator], environment: Mapping[str, str]) -> str:
    allowed = environment.get("JAX_PLATFORMS")
    if allowed:
        return f"JAX_PLATFORMS={allowed} allows no other platform: unset it, or install the plugin of that one."
    if accelerators and not probe.said:
        return "Another process may hold the device, or its driver hangs. `--timeout 300` waits longer."
    return "The lines of JAX below say why." if probe.said else "Try `python -c 'import jax; print(jax.devices())'`."


def _print(console: "Console", name: str, text: str) -> None:
    line = f"{name:<10} {text}"
    if console.is_terminal:
        line = textwrap.fill(
            line, console.width, subsequent_indent=" " * 11, break_long_words=False, break_on_hyphens=False
        )
    console.print(line, markup=False)


def _origin() -> str:
    """Where the package lies, and whether changes to it take effect."""
    folder = Path(__file__).resolve().parents[1]
    try:
        url = json.loads(importlib.metadata.distribution("meshpipe").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return f"{folder}, not installed"
    is_editable = url.get("dir_info", {}).get("editable") and url["url"] == folder.parent.as_uri()
    return f"{folder}{', editable' if is_editable else ''}"


def _pairs(found: Mapping[str, str], leave_out: tuple[str, ...] = ()) -> str:
    return ", ".join(f"{name} {version}" for name, version in found.items() if name not in leave_out)


def _machine(root: Path) -> str:
    from meshpipe.report.tables import format_bytes

    cores, memory = usable_cores(root), host_memory(root)
    text = f"{cores:g} core{'' if cores == 1 else 's'}"
    if memory is None:
        return text
    return f"{text}, {format_bytes(memory[0])} of memory, {format_bytes(memory[1])} free"


def _describe(accelerator: Accelerator) -> str:
    driver = f", driver {accelerator.driver}" if accelerator.driver else ""
    return f"{accelerator.kind} ({', '.join(accelerator.found)}{driver})"


def _article(accelerator: Accelerator) -> str:
    return f"{'an' if accelerator.kind[0] == 'N' else 'a'} {accelerator.kind}"


def _variables(environment: Mapping[str, str]) -> str:
    names = sorted(
        name
        for name, value in environment.items()
        if name.startswith(PREFIXES) and name not in SET_BY_JAX and value != ANSWERS.get(name)
    )
    return " ".join(f"{name}={'(set)' if name == SECRET else environment[name]}" for name in names)


def _devices(probe: Probe) -> str:
    from meshpipe.report.tables import format_bytes

    if probe.error:
        return "nothing"
    counts: dict[tuple[Any, ...], int] = {}
    for device in probe.devices:
        key = (device["platform"], device["kind"], device["memory"])
        counts[key] = counts.get(key, 0) + 1
    texts = []
    for (kind, name, memory), count in counts.items():
        size = f" of {format_bytes(memory)}" if memory and math.isfinite(memory) else ""
        texts.append(f"{count} {kind} device{'' if count == 1 else 's'}{f' ({name}{size})' if name != kind else ''}")
    virtual = " (a run makes as many virtual ones as its mesh needs)" if probe.platforms == {"cpu"} else ""
    return f"{', '.join(texts)}{virtual}; started in {probe.seconds:.1f} s"
