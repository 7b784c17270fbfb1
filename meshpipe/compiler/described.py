"""What XLA says of a program that was compiled for devices that are not here, and so cannot run."""

import json
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.compiler.cache import without_jax_cache
from meshpipe.compiler.refusal import CompilerError, argument_bytes, needed_bytes, spec_of

_COSTS = ("flops", "bytes accessed", "optimal_seconds")


@dataclass(frozen=True)
class MemoryStats:
    """Bytes of one device."""

    arguments: int
    outputs: int
    temporaries: int
    aliased: int
    """Outputs that take the place of donated arguments."""
    code: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "MemoryStats":
        found: Any = compiled.memory_analysis()
        return cls(
            arguments=found.argument_size_in_bytes,
            outputs=found.output_size_in_bytes,
            temporaries=found.temp_size_in_bytes,
            aliased=found.alias_size_in_bytes,
            code=found.generated_code_size_in_bytes,
        )


@dataclass(frozen=True)
class DescribedProgram:
    """Stands in for a compiled program where stages are compiled one after the other, and tells what XLA said of it."""

    out_info: Any
    """Shapes and dtypes of the results."""
    specs: tuple[PartitionSpec, ...]
    """How each result is sharded."""
    mesh: Mesh
    memory: MemoryStats
    costs: Mapping[str, float]
    """The compiler's own counts, where it makes some: `flops`, `bytes accessed`, `optimal_seconds`."""
    text: str = field(repr=False)
    """The optimised program of one device; empty where it is refused."""
    is_refused: bool = False
    """Whether it is larger than the memory of a device, so that the compiler stops. All that it needs beside its
    arguments then counts as temporaries."""

    def __call__(self, *arguments: Any) -> Any:
        raise RuntimeError("This program was compiled for devices that are only described: it cannot run.")

    @property
    def output_shardings(self) -> Any:
        """The shardings of the results, as a pytree like theirs."""
        return jax.tree.unflatten(
            jax.tree.structure(self.out_info), [NamedSharding(self.mesh, spec) for spec in self.specs]
        )

    def on(self, mesh: Mesh) -> "DescribedProgram":
        """The same for other devices of this kind, in the same arrangement."""
        return self if mesh == self.mesh else replace(self, mesh=mesh)

    def to_bytes(self) -> bytes:
        """What `read_described` reads."""
        parts = {
            "specs": [[list(a) if isinstance(a, tuple) else a for a in spec] for spec in self.specs],
            "memory": vars(self.memory),
            "costs": self.costs,
            "text": self.text,
            "is_refused": self.is_refused,
        }
        return zlib.compress(json.dumps(parts).encode(), 3)


def describe(lowered: jax.stages.Lowered, mesh: Mesh, options: Mapping[str, Any] | None) -> DescribedProgram:
    """Compiles a lowered program for devices that are not here.

    Raises `CompilerError` when the compiler fails, but for a program that does not fit into their memory.
    """
    try:
        compiled, text = _compile(lowered, mesh, dict(options or {}))
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
        if needed is None:
            raise CompilerError.of(lowered, mesh, str(error)) from error
        return _refused(lowered, mesh, needed)
    costs = compiled.cost_analysis() or {}
    return DescribedProgram(
        out_info=lowered.out_info,
        specs=tuple(
            getattr(sharding, "spec", PartitionSpec()) for sharding in jax.tree.leaves(compiled.output_shardings)
        ),
        mesh=mesh,
        memory=MemoryStats.of(compiled),
        costs={name: float(costs[name]) for name in _COSTS if name in costs},
        text=text,
    )


def _refused(lowered: jax.stages.Lowered, mesh: Mesh, needed: int) -> DescribedProgram:
    arguments = argument_bytes(lowered, mesh)
    beside = max(0, needed - arguments)
    return DescribedProgram(
        out_info=lowered.out_info,
        specs=tuple(spec_of(result, mesh) for result in jax.tree.leaves(lowered.out_info)),
        mesh=mesh,
        memory=MemoryStats(arguments=arguments, outputs=0, temporaries=beside, aliased=0, code=0),
        costs={},
        text="",
        is_refused=True,
    )


def _compile(lowered: jax.stages.Lowered, mesh: Mesh, options: dict[str, Any]) -> tuple[jax.stages.Compiled, str]:
    """The compiled program, and its text after all optimisations."""
    if mesh.devices.flat[0].platform != "tpu":
        with without_jax_cache():
            compiled = lowered.compile(compiler_options=options or None)
        return compiled, compiled.as_text() or ""
    # libtpu has instructions that the XLA in jaxlib cannot read, and its error is a trace of C++. So libtpu itself
    # writes the text, to a file.
    with tempfile.TemporaryDirectory(prefix="meshpipe-") as folder, without_jax_cache():
        compiled = lowered.compile(compiler_options={**options, "xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        found = sorted(Path(folder).glob("*.after_optimizations.txt"))
        return compiled, found[-1].read_text() if found else compiled.as_text() or ""


def read_described(data: bytes, lowered: jax.stages.Lowered, mesh: Mesh) -> DescribedProgram | None:
    """The program that `to_bytes` wrote, for the same lowered program; None if it was written otherwise."""
    try:
        parts = json.loads(zlib.decompress(data))
        return DescribedProgram(
            out_info=lowered.out_info,
            specs=tuple(
                PartitionSpec(*(tuple(a) if isinstance(a, list) else a for a in spec)) for spec in parts["specs"]
            ),
            mesh=mesh,
            memory=MemoryStats(**{own.name: parts["memory"][own.name] for own in fields(MemoryStats)}),
            costs=parts["costs"],
            text=parts["text"],
            is_refused=parts.get("is_refused", False),
        )
    except (zlib.error, ValueError, KeyError, TypeError):
        return None
