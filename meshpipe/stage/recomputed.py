"""What a traced backward computes again within its program: the checkpoints of rematerialisation."""

from collections.abc import Callable, Iterator

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxprs_in_params

from meshpipe.stage.jaxpr import CALL_PRIMITIVES, CHECKPOINT_PRIMITIVES, variables
from meshpipe.stage.residuals import values_not_written


def has_checkpoint(program: ClosedJaxpr | Jaxpr) -> bool:
    """Whether a program has a checkpoint, perhaps in a nested `jit`; those of loops do not count."""
    jaxpr = program.jaxpr if isinstance(program, ClosedJaxpr) else program
    # A loop stays whole (`inline`), and so do the checkpoints inside it.
    calls = [e for e in jaxpr.eqns if e.primitive.name in CALL_PRIMITIVES]
    return any(e.primitive.name in CHECKPOINT_PRIMITIVES or has_checkpoint(e.params["jaxpr"]) for e in calls)


def recomputed_bytes(closed: ClosedJaxpr, size: Callable[[Var], int]) -> int:
    """The most bytes that a backward has at once inside a checkpoint, which it computes again and uses.

    An estimate of XLA's temporary memory for it: equations run in their order, a value is there from its equation to
    the last that reads it, and what XLA computes where it is read takes no memory. Inputs and outputs of checkpoints
    are not counted. Checkpoints run one after the other, so the largest counts. `size` has the bytes of a value.
    """
    return max((_peak(jaxpr, size) for jaxpr in _checkpoints(closed.jaxpr)), default=0)


def _checkpoints(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """The programs of the outermost checkpoints."""
    for equation in jaxpr.eqns:
        is_checkpoint = equation.primitive.name in CHECKPOINT_PRIMITIVES
        for inner in jaxprs_in_params(equation.params):
            if is_checkpoint:
                yield inner
            else:
                yield from _checkpoints(inner)


def _peak(jaxpr: Jaxpr, size: Callable[[Var], int]) -> int:
    """The most bytes that are there at once of what a program computes for itself."""
    unwritten = values_not_written(jaxpr)
    sources: dict[Var, set[Var]] = {}
    last: dict[Var, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        read = set[Var]().union(*(sources.get(v, {v}) for v in variables(equation.invars)))
        sources.update((v, read) for v in equation.outvars if v in unwritten)
        # What reads a value that was never written reads what that is computed from.
        last.update(dict.fromkeys(read, index))
    outputs = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    held, most = 0, 0
    ends: dict[int, int] = {}
    for index, equation in enumerate(jaxpr.eqns):
        for value in equation.outvars:
            if value in last and value not in unwritten and value not in outputs:
                held += size(value)
                # Freed after the equation that reads it last, whose own results need room beside it.
                ends[last[value]] = ends.get(last[value], 0) + size(value)
        most = max(most, held + max((_peak(inner, size) for inner in jaxprs_in_params(equation.params)), default=0))
        held -= ends.pop(index, 0)
    return most
