"""Serialises a compiled program and loads it for other devices, which takes milliseconds; compiling takes seconds.

It uses private API of JAX, because `jax.experimental.serialize_executable` loads a program only for the devices that it
was compiled for. If another version of JAX has moved a part, or the backend does not support it, functions return None
and callers compile instead; `tests/compiler/test_reload.py` fails if that happens on CPU.
"""

import io
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh


@dataclass(frozen=True)
class Serialised:
    """A compiled program as bytes, which can be loaded only on the same machine with the same versions."""

    data: bytes
    device_ids: tuple[int, ...]
    """The devices that it refers to."""


def serialise(compiled: jax.stages.Compiled, mesh: Mesh) -> Serialised | None:
    """Serialises a program that XLA compiled in this process for the devices of `mesh`.

    None for programs with Python callbacks, or with constants that JAX passes as arguments. Do not pass a program that
    JAX loaded from its own cache (see `compile_noting_origin`): XLA's CPU backend silently loses parts of those.
    """
    try:
        unloaded = compiled._executable._unloaded_executable  # type: ignore[attr-defined]
        effects = (*unloaded.unordered_effects, *unloaded.ordered_effects)
        if effects or unloaded.host_callbacks or unloaded.keepalive:
            return None
        return Serialised(serialize_executable.serialize(compiled)[0], tuple(d.id for d in mesh.devices.flat))
    except Exception:
        return None


def compile_noting_origin(lowered: jax.stages.Lowered, options: dict[str, Any] | None) -> tuple[Any, bool]:
    """The compiled program, and whether XLA compiled it now; otherwise JAX loaded it from its own cache."""
    _seen.requests = _seen.hits = 0
    compiled = lowered.compile(compiler_options=options)
    settings = jax.config.values
    is_off = not settings["jax_compilation_cache_dir"] or not settings["jax_enable_compilation_cache"]
    if is_off and not _seen.requests:  # JAX asks a cache that it has used before also where it is turned off since
        return compiled, True
    return compiled, _seen.requests > _seen.hits  # without any event, assume that JAX loaded it


class _Seen(threading.local):
    """Requests and hits of JAX's cache in this thread."""

    requests = 0
    hits = 0


_seen = _Seen()


def _count(event: str, **details: Any) -> None:
    _seen.requests += event == "/jax/compilation_cache/compile_requests_use_cache"
    _seen.hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count)


def load(program: Serialised, target: Mesh, in_tree: Any, out_tree: Any) -> jax.stages.Compiled | None:
    """The program for `target`, a mesh of the same shape with devices of the same kind.

    `in_tree` and `out_tree` are the structures of its arguments and results, which the bytes do not contain.
    """
    try:
        executable, arguments, no_keywords = _unpickler(program, list(target.devices.flat)).load()
        information = jax.tree.unflatten(in_tree, arguments)
        return jax.stages.Compiled(executable.load(), [], information, out_tree, no_kwargs=no_keywords)
    except Exception:
        return None


def kept_arguments(lowered: jax.stages.Lowered) -> Hashable:
    """The indices of the arguments that the program reads; JAX drops the others. None if they are unknown."""
    try:
        return tuple(sorted(lowered._lowering.compile_args["kept_var_idx"]))
    except (AttributeError, KeyError, TypeError):
        return None


def _unpickler(program: Serialised, devices: list[jax.Device]) -> Any:
    """Replaces the devices in the bytes by `devices`, including those in the shardings of arguments and results."""
    from jax._src import compiler
    from jax._src.lib import xla_client

    ids = [[device.id for device in devices]]
    options = compiler.get_compile_options(num_replicas=1, num_partitions=len(devices), device_assignment=ids)
    counterpart = dict(zip(program.device_ids, devices, strict=True))
    client = devices[0].client

    class Unpickler(serialize_executable._JaxPjrtUnpickler):
        def persistent_load(self, reference: tuple[Any, ...]) -> Any:
            if reference[0] == "exec":
                return client.deserialize_executable(reference[1], xla_client.DeviceList(tuple(devices)), options)
            return counterpart[reference[1]] if reference[0] == "device" else super().persistent_load(reference)

    return Unpickler(io.BytesIO(program.data), client, devices)
