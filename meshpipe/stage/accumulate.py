"""What a stage adds up over the microbatches of a step: gradients, and in the last stage the loss and its weight."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.compiler.compiler import Compiler
from meshpipe.mesh import DATA
from meshpipe.sharding import abstract
from meshpipe.stage.jaxpr import function_of
from meshpipe.stage.partial_sums import PartialSums
from meshpipe.stage.traced import Arrays, Shapes, TracedStage


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
    terms: Shapes
    """What each term is."""
    in_terms: frozenset[int]

    @classmethod
    def of(cls, results: Shapes, programs: Sequence[Summands], terms: Shapes | None = None) -> "Sums":
        """Those to which the programs add. In terms where that is possible, and these are not split over the data axis
        themselves. Terms lie on the other axes as their sums do, unless given.
        """
        terms = results if terms is None else terms
        whole = (i for i, term in enumerate(terms) if DATA not in term.sharding.spec)
        return cls(results, terms, frozenset(i for i in whole if all(p.can_be_in_terms(i) for p in programs)))

    @property
    def shapes(self) -> Shapes:
        """The accumulators: `[parts of the data axis, ...]` for those in terms."""
        return tuple(
            _one_per_part(term) if i in self.in_terms else result
            for i, (result, term) in enumerate(zip(self.results, self.terms, strict=True))
        )

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
) -> Callable[..., tuple[Arrays, Arrays]] | None:
    """Makes results of all accumulators, which is all that devices of the data axis say to each other about gradients;
    None where they are the same.
    """
    if not gradients.in_terms and not totals.in_terms:
        return None
    count, results = len(gradients.results), (*gradients.results, *totals.results)

    def reduce(*sums: jax.Array) -> tuple[Arrays, Arrays]:
        return gradients.reduce(sums[:count]), totals.reduce(sums[count:])

    run = jax.jit(
        reduce,
        # A device's term is as large as the result, unless the data axis splits that.
        donate_argnums=tuple(i for i, s in enumerate(results) if DATA not in s.sharding.spec),
        out_shardings=tuple(tuple(s.sharding for s in sums.results) for sums in (gradients, totals)),
    )
    return compiler.compile(run.lower(*gradients.shapes, *totals.shapes), mesh)


def _one_per_part(term: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    mesh, spec = term.sharding.mesh, term.sharding.spec
    return abstract((mesh.shape[DATA], *term.shape), term.dtype, NamedSharding(mesh, PartitionSpec(DATA, *spec)))
