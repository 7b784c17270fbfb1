"""Compiled programs kept in a folder for later runs, whatever the devices that they ran on."""

import contextlib
import functools
import hashlib
import json
import os
import platform
import stat
import sys
import tempfile
import uuid
import weakref
from importlib.metadata import version
from pathlib import Path

import jax

from meshpipe.compiler.reload import Serialised
from meshpipe.errors import ArgumentError

_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "PJRT_NPROC")
"""Variables of the environment that change what is compiled."""


JAX_SUBFOLDER = "meshpipe"
"""Where programs are kept below the folder of JAX's own cache."""


class CompileCache:
    """A folder of programs that belongs to this user alone: loading a program can execute anything that its file says.

    Made if it is missing, with access for nobody else. Raises `ValueError` where that is not possible, and for a folder
    of another user or one that others may write to. Programs of other versions, machines or settings of JAX are left
    alone, and so are files that are not whole, are links, or could have been written by others.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder).expanduser()
        self._has_warned = False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # All files are opened by this descriptor, so they are in the folder that is checked here, even if somebody
            # gives its name to another.
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            problem = _open_to_others(os.fstat(self._descriptor))
            if problem is not None:
                raise ArgumentError(
                    "`compile_cache` must be a folder that only you can write to: programs from it are executed. "
                    f"Got {str(folder)!r}, which {problem}. Name another folder"
                    + (f", or run `chmod go-w {self._folder}`." if "may write" in problem else ".")
                )
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise ArgumentError(
                "`compile_cache` must be a folder that can be written to. "
                f"Got {str(folder)!r}: {error.strerror}. Choose another, or leave it out."
            ) from error

    def read(self, key: str) -> Serialised | None:
        """What was written under this key, by a run that compiles the same in the same way."""
        name = _file_name(key)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            with open(os.open(name, flags, dir_fd=self._descriptor), "rb") as file:
                status = os.fstat(file.fileno())
                problem = _open_to_others(status)
                if problem is not None:
                    self._warn(name, problem)
                if problem is not None or not stat.S_ISREG(status.st_mode):
                    return None
                checksum, ids, data = file.read().split(b"\n", 2)
        except (OSError, ValueError):
            return None
        return Serialised(data, tuple(json.loads(ids))) if checksum == _checksum(ids + data) else None

    def write(self, key: str, program: Serialised) -> None:
        """A write that fails (a full disk) only costs the next run its time."""
        ids = json.dumps(program.device_ids).encode()
        name = _file_name(key)
        part = f"{name}.{uuid.uuid4().hex}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with open(os.open(part, flags, 0o600, dir_fd=self._descriptor), "wb") as file:
                file.write(b"\n".join((_checksum(ids + program.data), ids, program.data)))
            os.replace(part, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(part, dir_fd=self._descriptor)

    def _warn(self, name: str, problem: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            print(
                f"meshpipe: a compiled program is not loaded, since {self._folder / name} {problem}. It and others "
                "like it are compiled anew.",
                file=sys.stderr,
                flush=True,
            )


def open_cache(folder: str | None) -> CompileCache | None:
    """The cache in this folder; without one, a subfolder of JAX's own cache, where that is in use and can be one.

    JAX keeps a program for each place that it runs at, and what it loads cannot be copied to others.
    """
    if folder is not None:
        return CompileCache(folder)
    of_jax = jax.config.values["jax_compilation_cache_dir"]
    if not of_jax or "://" in of_jax or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    with contextlib.suppress(ValueError):
        return CompileCache(Path(of_jax) / JAX_SUBFOLDER)
    return None


def _open_to_others(status: os.stat_result) -> str | None:
    """How somebody else than this user could have written a file or folder; None where nobody could."""
    if status.st_uid != os.geteuid():
        return f"belongs to another user ({status.st_uid}, and this is {os.geteuid()})"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _file_name(key: str) -> str:
    return f"{hashlib.sha256((key + _surroundings()).encode()).hexdigest()}.program"


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
