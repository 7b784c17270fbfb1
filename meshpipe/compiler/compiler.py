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
from meshpipe.compiler.reload import Serialised, compile_noting_origin, kept_arguments, load, serialise

Options = Mapping[str, Any] | None


@dataclass(frozen=True)
class _Program:
    """A program as first compiled or loaded; `serialised` is None if it cannot be copied."""

    compiled: jax.stages.Compiled
    mesh: Mesh
    lowered: jax.stages.Lowered
    serialised: Serialised | None

    def copy_to(self, mesh: Mesh) -> jax.stages.Compiled | None:
        if mesh == self.mesh:
            return self.compiled
        if self.serialised is None or _place(mesh) != _place(self.mesh):
            return None
        return load(self.serialised, mesh, self.lowered.in_tree, self.lowered.out_tree)


class Compiler:
    """Compiles equal programs once; they are equal if XLA gets the same text. Keep one while equal programs may follow.

    Thread-safe: the first thread that requests a program compiles it, and the others wait for it. With a cache,
    programs also come from earlier runs.
    """

    def __init__(self, cache: CompileCache | None = None) -> None:
        self.cache = cache
        self._programs: dict[Hashable, Future[_Program]] = {}
        self._origins: dict[int, tuple[jax.stages.Compiled, _Program]] = {}
        """By the id of the returned program."""
        self._lock = Lock()

    def compile(self, lowered: jax.stages.Lowered, mesh: Mesh, options: Options = None) -> jax.stages.Compiled:
        """Compiles a lowered program for all devices of `mesh`, or copies an equal one if possible."""
        key = _key(lowered, mesh, options)
        if key is None:
            return _compile(lowered, options)[0]
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

    def copy(self, compiled: jax.stages.Compiled, mesh: Mesh) -> jax.stages.Compiled | None:
        """Copies a program returned by `compile` to a submesh of the same shape; None if that is impossible."""
        _, program = self._origins.get(id(compiled), (None, None))
        return None if program is None else self._noted(program.copy_to(mesh), program)

    def _noted(self, compiled: jax.stages.Compiled | None, program: _Program) -> jax.stages.Compiled | None:
        if compiled is not None:
            self._origins[id(compiled)] = compiled, program
        return compiled

    def _first(self, lowered: jax.stages.Lowered, mesh: Mesh, options: Options, key: str) -> _Program:
        if self.cache is not None and (stored := self.cache.read(key)) is not None:
            loaded = load(stored, mesh, lowered.in_tree, lowered.out_tree)
            if loaded is not None:
                return _Program(loaded, mesh, lowered, stored)
        compiled, is_new = _compile(lowered, options)
        serialised = serialise(compiled, mesh) if is_new else None
        if self.cache is not None and serialised is not None:
            self.cache.write(key, serialised)
        return _Program(compiled, mesh, lowered, serialised)


def _compile(lowered: jax.stages.Lowered, options: Options) -> tuple[jax.stages.Compiled, bool]:
    """The program, and whether it may be copied."""
    return compile_noting_origin(lowered, dict(options) if options else None)


def _key(lowered: jax.stages.Lowered, mesh: Mesh, options: Options) -> str | None:
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
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _place(mesh: Mesh) -> tuple[Any, ...]:
    """The properties of the submesh that a program depends on."""
    devices = {(d.platform, d.device_kind, d.process_index) for d in mesh.devices.flat}
    return tuple(mesh.shape.items()), tuple(map(str, mesh.axis_types)), tuple(sorted(devices))
