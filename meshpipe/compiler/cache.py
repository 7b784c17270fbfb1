"""A cache of compiled programs in a folder, independent of the devices that they ran on."""

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
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from threading import Lock

import jax
from jax.experimental.compilation_cache import compilation_cache

from meshpipe.compiler.reload import Serialised
from meshpipe.errors import ArgumentError
from meshpipe.files import expanded, missing_folders, remove_empty

_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "PJRT_NPROC")
"""Environment variables that affect compilation."""


JAX_SUBFOLDER = "meshpipe"
"""Subfolder of JAX's own cache in which programs are kept."""


class CompileCache:
    """A folder of programs that only this user may write to, since loading a program can execute arbitrary code.

    A missing folder is created, with access only for this user. Raises `ValueError` if that fails, or if the folder
    belongs to another user or others may write to it. Ignores programs from other versions, machines or JAX settings,
    and files that are incomplete, symbolic links, or possibly written by others.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = expanded("compile_cache", folder)
        self._has_warned = False
        self._made = missing_folders(self._folder)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # All files are opened relative to this descriptor, so they lie in the folder checked here, even if another
            # folder takes its name later.
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
                "`compile_cache` must be a writable folder. "
                f"Got {str(folder)!r}: {error.strerror}. Choose another, or leave it out."
            ) from error

    def remove_if_empty(self) -> None:
        """Removes the folder again if it was made for this cache and nothing was stored."""
        remove_empty(self._made)

    def read(self, key: str) -> Serialised | None:
        """The program with this key, written by a run with the same versions, machine and settings; None if absent."""
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
        """Stores a program. A failed write (e.g. a full disk) is ignored; the next run compiles again."""
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
                "like it are recompiled.",
                file=sys.stderr,
                flush=True,
            )


def open_cache(folder: str | None) -> CompileCache | None:
    """The cache in this folder. By default, a subfolder of JAX's own cache, if JAX uses one and it is suitable.

    JAX's own cache stores a program per device assignment, and a program that it loads cannot be copied to others.
    """
    if folder is not None:
        return CompileCache(folder)
    of_jax = jax.config.values["jax_compilation_cache_dir"]
    if not of_jax or "://" in of_jax or not jax.config.values["jax_enable_compilation_cache"]:
        return None
    with contextlib.suppress(ValueError):
        return CompileCache(Path(of_jax) / JAX_SUBFOLDER)
    return None


@contextlib.contextmanager
def without_jax_cache() -> Iterator[None]:
    """Turns JAX's own cache off while any thread is in this context.

    It would write programs for devices that are only described, and could not read them. JAX has the setting for all
    threads: what others compile meanwhile is not stored either.
    """
    with _off.lock:
        if _off.threads == 0:
            _off.setting = jax.config.values["jax_enable_compilation_cache"]
            _set_jax_cache(False)
        _off.threads += 1
    try:
        yield
    finally:
        with _off.lock:
            _off.threads -= 1
            if _off.threads == 0:
                _set_jax_cache(_off.setting)


@dataclass
class _Off:
    threads: int = 0
    setting: bool = True
    """What it was before the first of them."""
    lock: Lock = field(default_factory=Lock)


_off = _Off()


def _set_jax_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX reads the setting only when it first compiles


def _open_to_others(status: os.stat_result) -> str | None:
    """How another user could have written a file or folder; None if none could."""
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
    """Everything besides its text that a compiled program depends on: versions, machine, settings."""
    settings = {name: os.environ.get(name) for name in _SETTINGS}
    backend = jax.devices()[0].client
    versions = (jax.__version__, version("jaxlib"), backend.platform_version)
    options = sorted((name, repr(value)) for name, value in jax.config.values.items() if name not in _ELSEWHERE)
    return repr((versions, _processor(), os.cpu_count(), settings, options))


_ELSEWHERE = ("jax_num_cpu_devices", "jax_compilation_cache_dir", "jax_enable_compilation_cache")
"""Settings that do not affect a program, or that are part of its key."""


def _processor() -> tuple[str, ...]:
    """Identifies the processor; programs for the CPU use its instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    known = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return (platform.system(), platform.machine(), platform.processor(), *known)
