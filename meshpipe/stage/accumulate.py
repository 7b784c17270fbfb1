"""Accumulates over the microbatches of a step: gradients, and in the last stage the loss and its weight."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from meshpipe.compiler.compiler import Compiler
from meshpipe.mesh import DATA
from meshpipe.sharding import Arrays, Shapes, abstract, is_over_data, splits_microbatch
from meshpipe.stage.jaxpr import function_of
from meshpipe.stage.partial_sums import PartialSums
from meshpipe.stage.traced import TracedStage


class AccumulatedOutputs:
    """A traced program, and the accumulator to which each of some of its outputs is added.

    Where microbatches are split over a data axis, an output may stay unreduced: one partial sum per part of that axis.
    """

    def __init__(self, stage: TracedStage, closed: ClosedJaxpr, targets: Mapping[int, int]):
        """`targets` gives the number of an accumulator by the number of an output."""
        self._closed, self._targets = closed, targets
        parts = stage.spec.mesh.shape.get(DATA, 1)
        is_split = parts > 1 and splits_microbatch(stage.spec.mesh, stage.microbatch_size)
        self._partial = PartialSums(closed, parts, stage.microbatch_size) if is_split else None

    def can_stay_unreduced(self, target: int) -> bool:
        """Whether what is added to this accumulator, if anything, can be computed as partial sums."""
        available = self._partial.available if self._partial is not None else ()
        # Only as a whole: the buffer has either one partial sum per part of the axis, or one sum.
        return all(output in available for output, other in self._targets.items() if other == target)

    def function(self, unreduced: Set[int]) -> Callable[..., list[Any]]:
        """The program as a function of flat arrays; it returns partial sums for the accumulators in `unreduced`."""
        partial = self._partial
        if partial is None:
            return function_of(self._closed)
        outputs = {output for output, target in self._targets.items() if target in unreduced}
        return lambda *arguments: partial.run(arguments, outputs)


def numbered(accumulators: Sequence[int], first: int = 0) -> dict[int, int]:
    """The accumulators of successive outputs by the number of the output, from `first` on."""
    return dict(enumerate(accumulators, first))


@dataclass(frozen=True)
class Accumulators:
    """What a stage adds up over the microbatches of a step, and which of it stays unreduced until the end of the step.

    The all-reduce over the data axis then happens once per step instead of once per microbatch.
    """

    results: Shapes
    """The totals at the end of the step."""
    partials: Shapes
    """One partial sum of each total."""
    unreduced: frozenset[int]
    """The numbers of the accumulators that hold one partial sum per part of the data axis."""

    @classmethod
    def of(
        cls, results: Shapes, programs: Sequence[AccumulatedOutputs], partials: Shapes | None = None
    ) -> "Accumulators":
        """The accumulators to which the programs add.

        An accumulator stays unreduced where every program can compute its partial sums. One whose partial sums would be
        split over the data axis themselves cannot. Partial sums are sharded as `results` unless `partials` says
        otherwise.
        """
        partials = results if partials is None else partials
        # Each device already holds only its part of such a gradient; one partial sum per device would be as large as
        # all parts together.
        candidates = (i for i, partial in enumerate(partials) if not is_over_data(partial.sharding.spec))
        unreduced = frozenset(i for i in candidates if all(p.can_stay_unreduced(i) for p in programs))
        return cls(results, partials, unreduced)

    @property
    def shapes(self) -> Shapes:
        """The accumulators' shapes: `[parts of the data axis, ...]` for those that stay unreduced."""
        return tuple(
            _one_per_part(partial) if i in self.unreduced else result
            for i, (result, partial) in enumerate(zip(self.results, self.partials, strict=True))
        )

    @property
    def shardings(self) -> tuple[Any, ...]:
        return tuple(s.sharding for s in self.shapes)

    def add(self, accumulators: Arrays, values: Mapping[int, jax.Array]) -> Arrays:
        """Adds values to some of the accumulators."""
        # Accumulators are donated, so XLA adds in place.
        return tuple(a + values[i].astype(a.dtype) if i in values else a for i, a in enumerate(accumulators))

    def reduce(self, accumulators: Arrays) -> Arrays:
        """Sums over the data axis; XLA's partitioner turns that into the all-reduce."""
        # The first dim is split over the axis, one partial sum on each part of it.
        return tuple(a.sum(0) if i in self.unreduced else a for i, a in enumerate(accumulators))


def compile_zeros(
    gradients: Accumulators, totals: Accumulators, mesh: Mesh, compiler: Compiler
) -> Callable[[], tuple[Arrays, Arrays]]:
    """Compiles the program that makes the accumulators of a step, filled with zeros."""
    shapes = gradients.shapes, totals.shapes
    if not any(shapes):
        return lambda: ((), ())
    make = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        out_shardings=(gradients.shardings, totals.shardings),
    )
    return compiler.compile(make.lower(), mesh)


def compile_reduce(
    gradients: Accumulators, totals: Accumulators, mesh: Mesh, compiler: Compiler
) -> Callable[..., tuple[Arrays, Arrays]] | None:
    """Compiles the program that reduces all accumulators over the data axis: the only communication of that axis for
    gradients.

    None where no accumulator is unreduced.
    """
    if not gradients.unreduced and not totals.unreduced:
        return None
    count, results = len(gradients.results), (*gradients.results, *totals.results)

    def reduce(*sums: jax.Array) -> tuple[Arrays, Arrays]:
        return gradients.reduce(sums[:count]), totals.reduce(sums[count:])

    run = jax.jit(
        reduce,
        # XLA can reuse a donated buffer only for an output of the same size on each device. A partial sum has that size
        # unless the data axis splits the result.
        donate_argnums=tuple(i for i, s in enumerate(results) if not is_over_data(s.sharding.spec)),
        out_shardings=tuple(tuple(s.sharding for s in sums.results) for sums in (gradients, totals)),
    )
    return compiler.compile(run.lower(*gradients.shapes, *totals.shapes), mesh)


def _one_per_part(partial: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    mesh, spec = partial.sharding.mesh, partial.sharding.spec
    return abstract((mesh.shape[DATA], *partial.shape), partial.dtype, NamedSharding(mesh, PartitionSpec(DATA, *spec)))
