"""What a stage adds up over the microbatches of a step: gradients, and in the last stage the loss and its weight."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.compiler import Compiler
from meshpipe.mesh import DATA
from meshpipe.pipeline.jaxpr import function_of
from meshpipe.pipeline.partial_sums import PartialSums
from meshpipe.pipeline.stage import Arrays, Shapes, TracedStage
from meshpipe.sharding import abstract


class Summands:
    """A traced program, and to which sum each of some of its outputs is added.

    Where microbatches are split over a data axis, a sum may be kept in terms, one for each part of that axis.
    """

    def __init__(self, stage: TracedStage, closed: ClosedJaxpr, sums: Mapping[int, int]):
        self._closed, self._sums = closed, sums
        parts = stage.spec.mesh.shape.get(DATA, 1)
        self._partial = PartialSums(closed, parts, stage.microbatch_size) if parts > 1 else None

    def can_be_in_terms(self, target: int) -> bool:
        """Whether what is added to this sum, if anything, can be had in terms."""
        available = self._partial.available if self._partial is not None else ()
        return all(output in available for output, other in self._sums.items() if other == target)

    def function(self, in_terms: Set[int]) -> Callable[..., list[Any]]:
        """The program as a function of flat arrays; what is added to the sums `in_terms` comes in terms."""
        partial = self._partial
        if partial is None:
            return function_of(self._closed)
        outputs = {output for output, target in self._sums.items() if target in in_terms}
        return lambda *arguments: partial.run(arguments, outputs)


@dataclass(frozen=True)
class Sums:
    """Sums over the microbatches of a step, and which of them hold terms until its end."""

    results: Shapes
    """What they are in the end."""
    in_terms: frozenset[int]

    @classmethod
    def of(cls, results: Shapes, programs: Sequence[Summands]) -> "Sums":
        """Those to which the programs add. In terms where that is possible, and the result is not split over the data
        axis itself, as the gradients of ZeRO-3 are.
        """
        return cls(
            results,
            frozenset(
                i
                for i, result in enumerate(results)
                if DATA not in result.sharding.spec and all(program.can_be_in_terms(i) for program in programs)
            ),
        )

    @property
    def shapes(self) -> Shapes:
        """The accumulators: `[parts of the data axis, ...]` for those in terms."""
        return tuple(_in_terms(s) if i in self.in_terms else s for i, s in enumerate(self.results))

    @property
    def shardings(self) -> tuple[Any, ...]:
        return tuple(s.sharding for s in self.shapes)

    def add(self, accumulators: Arrays, values: Mapping[int, jax.Array]) -> Arrays:
        """Adds values to some of the accumulators."""
        return tuple(a + values[i].astype(a.dtype) if i in values else a for i, a in enumerate(accumulators))

    def reduce(self, accumulators: Arrays) -> Arrays:
        return tuple(a.sum(0) if i in self.in_terms else a for i, a in enumerate(accumulators))


def compile_zeros(gradients: Sums, totals: Sums, mesh: Mesh, compiler: Compiler) -> Callable[[], tuple[Arrays, Arrays]]:
    """Makes fresh accumulators."""
    shapes = gradients.shapes, totals.shapes
    if not any(shapes):
        return lambda: ((), ())
    make = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        out_shardings=(gradients.shardings, totals.shardings),
    )
    return compiler.compile(make.lower(), mesh)


def compile_reduce(
    gradients: Sums, totals: Sums, mesh: Mesh, compiler: Compiler
) -> Callable[[Arrays, Arrays], tuple[Arrays, Arrays]] | None:
    """Makes results of accumulators, which is all that devices of the data axis say to each other about gradients; None
    where they are the same.
    """
    if not gradients.in_terms and not totals.in_terms:
        return None
    run = jax.jit(
        lambda *sums: (gradients.reduce(sums[0]), totals.reduce(sums[1])),
        donate_argnums=(0, 1),  # a device's term and its result are equally large
        out_shardings=tuple(tuple(s.sharding for s in sums.results) for sums in (gradients, totals)),
    )
    return compiler.compile(run.lower(gradients.shapes, totals.shapes), mesh)


def _in_terms(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    mesh, spec = shape.sharding.mesh, shape.sharding.spec
    return abstract((mesh.shape[DATA], *shape.shape), shape.dtype, NamedSharding(mesh, PartitionSpec(DATA, *spec)))
