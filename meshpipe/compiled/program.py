"""What XLA says of one compiled program of a stage."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from jax.sharding import Mesh

from meshpipe.compiled.collectives import Collective, collectives_of
from meshpipe.compiled.hlo import Module
from meshpipe.compiled.work import bytes_accessed, products_of
from meshpipe.compiler.compiler import Compiled
from meshpipe.compiler.described import DescribedProgram, MemoryStats


@dataclass(frozen=True, kw_only=True)
class CompiledProgram:
    """One program of a stage, per device and per call."""

    stage: int
    name: str
    """`prepare`, `zeros`, `forward`, `recompute`, `backward`, `backward_input`, `backward_weight`, `forward_backward`,
    `reduce`; of an update `norm`, `update` and, in the last stage, `summary`."""
    arguments: int
    """Bytes of what it reads."""
    outputs: int
    """Bytes of what it returns, with what takes the place of donated arguments."""
    temporaries: int
    """Bytes that exist only while it runs."""
    aliased: int
    """Bytes of results that take the place of donated arguments."""
    code: int
    """Bytes of the program itself, where XLA tells."""
    products: Mapping[str, float]
    """Floating-point operations of matrix products, convolutions and attention, by dtype of their operands."""
    bytes_accessed: float
    """Bytes of the device's memory that it reads and writes: an estimate from the program's text."""
    optimal_seconds: float | None
    """The compiler's own estimate, of a TPU; it counts a loop's body once."""
    collectives: tuple[Collective, ...]
    is_refused: bool = False
    """Whether the compiler stops, as it needs more memory than a device has; see `DescribedProgram`."""

    @property
    def needs(self) -> int:
        """Bytes that it takes beside its arguments while it runs."""
        return self.outputs - self.aliased + self.temporaries

    @property
    def flops(self) -> float:
        return sum(self.products.values(), start=0.0)


class Analysis:
    """Reads compiled programs, each once, however many stages share it."""

    def __init__(self) -> None:
        self._known: dict[Hashable, CompiledProgram] = {}

    def of(self, compiled: Compiled, stage: int, name: str, mesh: Mesh) -> CompiledProgram:
        """What is known of a compiled program, as the one of a stage on a submesh."""
        if isinstance(compiled, DescribedProgram):
            text, memory, costs = compiled.text, compiled.memory, compiled.costs
        else:
            text, memory, costs = compiled.as_text() or "", MemoryStats.of(compiled), compiled.cost_analysis() or {}
        key = hash(text), memory, tuple(mesh.shape.items())
        if key in self._known:
            return replace(self._known[key], stage=stage, name=name)
        module = Module(text)
        found = CompiledProgram(
            stage=stage,
            name=name,
            arguments=memory.arguments,
            outputs=memory.outputs,
            temporaries=memory.temporaries,
            aliased=memory.aliased,
            code=memory.code,
            products=products_of(module),
            bytes_accessed=bytes_accessed(module),
            optimal_seconds=costs.get("optimal_seconds"),
            collectives=collectives_of(module, dict(mesh.shape)),
            is_refused=isinstance(compiled, DescribedProgram) and compiled.is_refused,
        )
        self._known[key] = found
        return found
