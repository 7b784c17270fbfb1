"""Cuts traced programs: keeps the equations that some outputs need, given values that are already there."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.extend.core import ClosedJaxpr, DropVar, Jaxpr, JaxprEqn, Literal, Var
from jax.sharding import Sharding

LAYOUT_PRIMITIVES = frozenset(
    {"broadcast_in_dim", "copy", "expand_dims", "optimization_barrier", "reshape", "squeeze", "transpose"}
)
"""Operations that at most rearrange an array. It is cheaper to repeat them inside a program than to store their result:
XLA fuses them into whatever reads them."""

CHECKPOINT_PRIMITIVES = frozenset({"remat2", "checkpoint"})
"""The names of `jax.checkpoint` in the versions of JAX that are supported."""

DERIVATIVE_PRIMITIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Calls of functions that come with a derivative of their own."""

CALL_PRIMITIVES = frozenset({"jit", "pjit", "closed_call"}) | CHECKPOINT_PRIMITIVES
"""Operations that only call a program of their own."""


class MissingInputError(ValueError):
    """A part of a traced program needs values that are not among its inputs."""


def extract(
    closed: ClosedJaxpr, inputs: Sequence[Var], outputs: Sequence[Var | Literal], *, effects: bool = False
) -> ClosedJaxpr:
    """The part of a traced program that computes `outputs` from `inputs`.

    Arguments:
        closed: The traced program.
        inputs: Inputs of the program, or values from its middle; the equations that make those stay out.
        outputs: Any values of the program.
        effects: Whether to keep equations with side effects (`jax.debug.print`) that no output needs.

    Raises `MissingInputError` when an output needs a value that is not given.
    """
    jaxpr = closed.jaxpr
    given = set(inputs)
    needed = {v for v in outputs if isinstance(v, Var)} - given
    kept: list[JaxprEqn] = []
    # Equations stand in an order in which each comes after what it reads, so one pass from the end finds all of them.
    for equation in reversed(jaxpr.eqns):
        if not any(v in needed for v in equation.outvars) and not (effects and equation.effects):
            continue
        kept.append(equation)
        needed.difference_update(equation.outvars)
        needed.update(v for v in variables(equation.invars) if v not in given)
    missing = needed - set(jaxpr.constvars)
    if missing:
        raise MissingInputError(f"All values that the outputs need must be given. {len(missing)} are not.")
    constants = [(v, c) for v, c in zip(jaxpr.constvars, closed.consts, strict=True) if v in needed]
    part = _replace(jaxpr, [v for v, _ in constants], inputs, outputs, kept[::-1], keep_effects=effects)
    return ClosedJaxpr(part, [c for _, c in constants])


def _replace(
    jaxpr: Jaxpr,
    constants: Sequence[Var],
    inputs: Sequence[Var],
    outputs: Sequence[Var | Literal],
    equations: Sequence[JaxprEqn],
    *,
    keep_effects: bool,
) -> Jaxpr:
    return jaxpr.replace(
        constvars=list(constants),
        invars=list(inputs),
        outvars=list(outputs),
        eqns=list(equations),
        effects=jaxpr.effects if keep_effects else frozenset(),
        # Its names belong to the inputs and outputs of the whole program, which the part does not have.
        debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )


def variables(atoms: Iterable[Var | Literal]) -> list[Var]:
    """The variables among the operands of an equation, without its literals."""
    return [a for a in atoms if isinstance(a, Var)]


def invariant_values(jaxpr: Jaxpr, sources: Iterable[Var]) -> set[Var]:
    """Every value that depends on nothing but `sources` and constants."""
    invariant = set(sources) | set(jaxpr.constvars)
    for equation in jaxpr.eqns:
        # An equation with an effect must run as often as the user wrote it, even if its operands never change.
        if not equation.effects and all(v in invariant for v in variables(equation.invars)):
            invariant.update(equation.outvars)
    return invariant


def hoistable_values(jaxpr: Jaxpr, sources: Sequence[Var], unwanted: Collection[Var] = ()) -> list[Var]:
    """Values worth computing once from `sources` instead of in every call.

    Such values are results of real work on the sources alone (a cast to bfloat16, a fused weight) that later equations
    use, perhaps rearranged. Rearrangements themselves stay in place. A value larger than the sources it comes from
    stays as well: it would be held in memory for the whole step. So does one of the `unwanted` that is an output and
    that no later equation uses.
    """
    invariant = invariant_values(jaxpr, sources)
    origin: dict[Var, frozenset[Var]] = {v: frozenset((v,)) for v in sources}
    for equation in jaxpr.eqns:
        of_operands = frozenset[Var]().union(*(origin.get(v, frozenset()) for v in variables(equation.invars)))
        origin.update(dict.fromkeys(equation.outvars, of_operands))
    used = set(variables(jaxpr.outvars)).difference(unwanted)
    hoisted: list[Var] = []
    # From the end, so that of a chain of invariant equations only the last value is hoisted: what leads to it is then
    # no longer used by anything that stays.
    for equation in reversed(jaxpr.eqns):
        if equation.outvars and equation.outvars[0] in invariant:
            wanted = [v for v in equation.outvars if v in used]
            if equation.primitive.name not in LAYOUT_PRIMITIVES and all(
                origin[v] and nbytes([v]) <= nbytes(origin[v]) for v in wanted
            ):
                hoisted += wanted
                continue
            if not wanted:
                continue
        used.update(variables(equation.invars))
    return hoisted[::-1]


def scan_sizes(equation: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are the same in every iteration, and how many are handed from one to the next."""
    body = equation.params["jaxpr"].jaxpr
    # Carries have the same rank inside and outside of the body; what is sliced or stacked has one dim more outside.
    # The names of the parameters that say so differ between versions of JAX.
    carries = _count_of_equal_rank(equation.outvars, body.outvars)
    return _count_of_equal_rank(equation.invars, body.invars) - carries, carries


def _count_of_equal_rank(outside: Sequence[Var | Literal], inside: Sequence[Var | Literal]) -> int:
    return sum(len(o.aval.shape) == len(i.aval.shape) for o, i in zip(outside, inside, strict=True))  # type: ignore[attr-defined]


def nbytes(values: Iterable[Var]) -> int:
    """The total bytes of these values."""
    return sum(v.aval.size * v.aval.dtype.itemsize for v in values)  # type: ignore[attr-defined]


def function_of(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """The traced program as a function of flat arrays that returns a list of arrays."""
    return jax.extend.core.jaxpr_as_fun(closed)


def apply_equation(jaxpr: Jaxpr, equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of one equation of a program."""
    given = {v: o for v, o in zip(equation.invars, operands, strict=True) if isinstance(v, Var)}
    outputs = [v for v in equation.outvars if not isinstance(v, DropVar)]
    # `primitive.bind` does not work for every primitive: those that hold programs (scan, custom_vjp) need these
    # unpacked first. JAX's own evaluation of a program knows how, so the equation becomes a program.
    single = _replace(jaxpr, (), list(given), outputs, [equation], keep_effects=False)
    results = iter(function_of(ClosedJaxpr(single, ()))(*given.values()))
    return [None if isinstance(v, DropVar) else next(results) for v in equation.outvars]


def inline(closed: ClosedJaxpr, waiting: Iterable[Var] = (), *, derivatives: bool = False) -> ClosedJaxpr:
    """The same program without calls: nested `jit` and `jax.checkpoint` are replaced by their equations.

    Everything else in `stage/` looks at equations, and would see a call as one equation that reads and computes
    everything at once. Loops and custom derivatives stay whole, and so do calls that set shardings, which would be
    lost. To be used once derivatives have been taken, when a checkpoint has nothing left to save. With `derivatives`,
    none is taken, and functions with a derivative of their own are calls like others.

    A checkpoint of a derivative begins when the gradient that it continues is there: XLA would otherwise recompute
    several at once, or find that it has computed the same before. As in JAX, a barrier sees to that; here it holds back
    those operands that depend on the inputs in `waiting`.
    """
    constants = list(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    equations: list[JaxprEqn] = []
    dependent = set(waiting)

    def append(equation: JaxprEqn) -> None:
        equations.append(equation)
        if not dependent.isdisjoint(variables(equation.invars)):
            dependent.update(equation.outvars)

    def held_back(equation: JaxprEqn, operands: list[Var | Literal]) -> list[Var | Literal]:
        """The operands of a checkpoint, behind a barrier."""
        held = [v for v in dict.fromkeys(variables(operands)) if v in dependent]
        if not held or not (equation.params.get("differentiated") and np.any(equation.params["prevent_cse"])):
            return operands
        (barrier,) = jax.make_jaxpr(jax.lax.optimization_barrier)([v.aval for v in held]).jaxpr.eqns
        after: dict[Var | Literal, Var | Literal] = {v: Var(v.aval) for v in held}
        append(barrier.replace(invars=held, outvars=list(after.values()), ctx=equation.ctx))
        return [after.get(v, v) if isinstance(v, Var) else v for v in operands]

    def add(jaxpr: Jaxpr, values: dict[Var, Var | Literal], rename: bool) -> list[Var | Literal]:
        def read(atom: Var | Literal) -> Var | Literal:
            return values.get(atom, atom) if isinstance(atom, Var) else atom

        for equation in jaxpr.eqns:
            operands = [read(v) for v in equation.invars]
            inner = _called(equation, derivatives)
            if inner is None:
                # Several calls may share one program, and a variable may be assigned only once.
                outputs = [Var(v.aval) if rename and not isinstance(v, DropVar) else v for v in equation.outvars]
                append(equation.replace(invars=operands, outvars=outputs))
                values.update(zip(equation.outvars, outputs, strict=True))
                continue
            if equation.primitive.name in CHECKPOINT_PRIMITIVES:
                operands = held_back(equation, operands)
            called = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
            own: dict[Var, Var | Literal] = {v: Var(v.aval) for v in called.constvars}
            if isinstance(inner, ClosedJaxpr):
                constants.extend(zip(own.values(), inner.consts, strict=True))
            results = add(called, own | dict(zip(called.invars, operands, strict=True)), True)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    if all(_called(equation, derivatives) is None for equation in closed.jaxpr.eqns):
        return closed
    outputs = add(closed.jaxpr, {}, False)
    constvars = [v for v, _ in constants]
    flat = _replace(closed.jaxpr, constvars, closed.jaxpr.invars, outputs, equations, keep_effects=True)
    return ClosedJaxpr(flat, [c for _, c in constants])


def _called(equation: JaxprEqn, derivatives: bool) -> Jaxpr | ClosedJaxpr | None:
    """The program that can replace an equation which is a call."""
    if equation.primitive.name in DERIVATIVE_PRIMITIVES:
        return equation.params["call_jaxpr"] if derivatives else None
    shardings = (*equation.params.get("in_shardings", ()), *equation.params.get("out_shardings", ()))
    is_call = equation.primitive.name in CALL_PRIMITIVES and not any(isinstance(s, Sharding) for s in shardings)
    return equation.params["jaxpr"] if is_call else None
