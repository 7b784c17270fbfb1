"""Compiles equal programs once: for one submesh, from which the others get copies, and perhaps for later runs."""

import hashlib
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock
from typing import Any

import jax
from jax.sharding import Mesh

from meshpipe.compiler.cache import CompileCache
from meshpipe.compiler.described import DescribedProgram, describe, read_described
from meshpipe.compiler.reload import Serialised, compile_noting_origin, kept_arguments, load, serialise
from meshpipe.mesh import is_described

Compiled = jax.stages.Compiled | DescribedProgram
"""A compiled program; for devices that are only described, what is known of it."""
Options = Mapping[str, Any] | None


@dataclass(frozen=True)
class _Program:
    """A program as first compiled or loaded; `serialised` is None if it cannot be copied."""

    compiled: Compiled
    mesh: Mesh
    lowered: jax.stages.Lowered
    serialised: Serialised | None

    def copy_to(self, mesh: Mesh) -> Compiled | None:
        if mesh == self.mesh:
            return self.compiled
        if isinstance(self.compiled, DescribedProgram):
            return self.compiled.on(mesh) if _place(mesh) == _place(self.mesh) else None
        if self.serialised is None or _place(mesh) != _place(self.mesh):
            return None
        return load(self.serialised, mesh, self.lowered.in_tree, self.lowered.out_tree)


class Compiler:
    """Compiles equal programs once; they are equal if XLA gets the same text. Keep one while equal programs may follow.

    Thread-safe: the first thread that requests a program compiles it, and the others wait for it. With a cache,
    programs also come from earlier runs. For devices that are only described, programs are `DescribedProgram`s, and
    `description` is what distinguishes them from other devices of the same name.
    """

    def __init__(self, cache: CompileCache | None = None, description: str = "") -> None:
        self.cache, self._description = cache, description
        self._programs: dict[Hashable, Future[_Program]] = {}
        self._origins: dict[int, tuple[Compiled, _Program]] = {}
        """By the id of the returned program."""
        self._lock = Lock()

    def compile(self, lowered: jax.stages.Lowered, mesh: Mesh, options: Options = None) -> Any:
        """Compiles a lowered program for all devices of `mesh`, or copies an equal one if possible."""
        key = _key(lowered, mesh, options, self._description)
        if key is None:
            return describe(lowered, mesh, options) if is_described(mesh) else _compile(lowered, options)[0]
        with self._lock:
            is_first = key not in self._programs
            future = self._programs.setdefault(key, Future())
        if is_first:
            try:
                future.set_result(self._first(lowered, mesh, options, key))
            except BaseException as error:
                future.set_exception(error)
        program = future.result()
        return self._noted(program.copy_to(mesh), program) or _compile(lowered, options)[0]

    def copy(self, compiled: Compiled, mesh: Mesh) -> Compiled | None:
        """Copies a program returned by `compile` to a submesh of the same shape; None if that is impossible."""
        _, program = self._origins.get(id(compiled), (None, None))
        return None if program is None else self._noted(program.copy_to(mesh), program)

    def _noted(self, compiled: Compiled | None, program: _Program) -> Compiled | None:
        if compiled is not None:
            self._origins[id(compiled)] = compiled, program
        return compiled

    def _first(self, lowered: jax.stages.Lowered, mesh: Mesh, options: Options, key: str) -> _Program:
        if is_described(mesh):
            return _Program(self._describe(lowered, mesh, options, key), mesh, lowered, None)
        if self.cache is not None and (stored := self.cache.read(key)) is not None:
            loaded = load(stored, mesh, lowered.in_tree, lowered.out_tree)
            if loaded is not None:
                return _Program(loaded, mesh, lowered, stored)
        compiled, is_new = _compile(lowered, options)
        serialised = serialise(compiled, mesh) if is_new else None
        if self.cache is not None and serialised is not None:
            self.cache.write(key, serialised)
        return _Program(compiled, mesh, lowered, serialised)

    def _describe(self, lowered: jax.stages.Lowered, mesh: Mesh, options: Options, key: str) -> DescribedProgram:
        stored = None if self.cache is None else self.cache.read(key)
        known = None if stored is None else read_described(stored.data, lowered, mesh)
        if known is not None:
            return known
        found = describe(lowered, mesh, options)
        if self.cache is not None:
            self.cache.write(key, Serialised(found.to_bytes(), ()))
        return found


def _compile(lowered: jax.stages.Lowered, options: Options) -> tuple[jax.stages.Compiled, bool]:
    """The program, and whether it may be copied."""
    return compile_noting_origin(lowered, dict(options) if options else None)


def _key(lowered: jax.stages.Lowered, mesh: Mesh, options: Options, description: str) -> str | None:
    """A key that identifies a program; None if it cannot be determined.

    The text contains constants, shardings and donation, but nothing about arguments that the program does not read.
    """
    kept = kept_arguments(lowered)
    if kept is None:
        return None
    weak = [getattr(out, "weak_type", False) for out in jax.tree.leaves(lowered.out_info)]
    arguments = [(str(argument), argument.donated) for argument in jax.tree.leaves(lowered.args_info)]
    parts = (
        lowered.as_text(),
        kept,
        arguments,
        str(lowered.in_tree),
        str(lowered.out_tree),
        weak,
        _place(mesh),
        dict(options or {}),
        *([description] if description else []),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _place(mesh: Mesh) -> tuple[Any, ...]:
    """The properties of the submesh that a program depends on."""
    devices = list(mesh.devices.flat)
    processes = [device.process_index for device in devices]
    version = ""
    if is_described(mesh):  # a process compiles for all hosts; it matters only which devices are on the same
        processes = [processes.index(process) for process in processes]
        version = devices[0].client.platform_version
    found = {(d.platform, d.device_kind, process) for d, process in zip(devices, processes, strict=True)}
    return tuple(mesh.shape.items()), tuple(map(str, mesh.axis_types)), tuple(sorted(found)), version
