"""Compiled programs kept in a folder for later runs, whatever the devices that they ran on."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import tempfile
import uuid
from importlib.metadata import version
from pathlib import Path

import jax

from meshpipe.compiler.reload import Serialised
from meshpipe.errors import ArgumentError

_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "PJRT_NPROC")
"""Variables of the environment that change what is compiled."""


class CompileCache:
    """A folder of programs; whoever can write to it can make a run do anything.

    Made if it is missing. Raises `ValueError` where that is not possible. Programs of other versions, machines or
    settings of JAX are left alone, and so are files that are not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise ArgumentError(
                "`compile_cache` must be a folder that can be written to. "
                f"Got {str(folder)!r}: {error.strerror}. Choose another, or leave it out."
            ) from error

    def read(self, key: str) -> Serialised | None:
        """What was written under this key, by a run that compiles the same in the same way."""
        try:
            checksum, ids, data = self._file(key).read_bytes().split(b"\n", 2)
        except (OSError, ValueError):
            return None
        return Serialised(data, tuple(json.loads(ids))) if checksum == _checksum(ids + data) else None

    def write(self, key: str, program: Serialised) -> None:
        """A write that fails (a full disk) only costs the next run its time."""
        ids = json.dumps(program.device_ids).encode()
        file = self._file(key)
        part = file.with_suffix(f".{uuid.uuid4().hex}")
        try:
            part.write_bytes(b"\n".join((_checksum(ids + program.data), ids, program.data)))
            part.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256((key + _surroundings()).encode()).hexdigest()}.program"


def _checksum(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()


@functools.cache
def _surroundings() -> str:
    """All that a compiled program depends on beside its text: versions, machine, settings."""
    settings = {name: os.environ.get(name) for name in _SETTINGS}
    backend = jax.devices()[0].client
    versions = (jax.__version__, version("jaxlib"), backend.platform_version)
    options = sorted((name, repr(value)) for name, value in jax.config.values.items() if name not in _ELSEWHERE)
    return repr((versions, _processor(), os.cpu_count(), settings, options))


_ELSEWHERE = ("jax_num_cpu_devices", "jax_compilation_cache_dir")
"""Settings that do not change a program, or that its key has."""


def _processor() -> tuple[str, ...]:
    """Programs for the CPU use what this processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return (platform.system(), platform.machine(), platform.processor(), *known)
