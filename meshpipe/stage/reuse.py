"""Lets a traced program read what another one has computed, instead of computing it again."""

from collections.abc import Hashable, Sequence

from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var


def reuse(program: ClosedJaxpr, other: ClosedJaxpr, inputs: Sequence[Var], results: Sequence[Var]) -> ClosedJaxpr:
    """The program without equations whose results the other one has computed from the same inputs.

    Arguments:
        program: A program whose inputs include those of the other, and its outputs.
        other: The other program.
        inputs: The inputs of `program` that stand for those of `other`, in their order.
        results: The inputs of `program` that stand for the outputs of `other`, in their order.
    """
    # Equal values get equal numbers: those of equal operations on values of equal numbers.
    numbers: dict[Var, int] = {}
    known: dict[Hashable, list[int]] = {}
    for number, pair in enumerate(zip(inputs, other.jaxpr.invars, strict=True)):
        # The two programs were traced apart, so the same input is another variable in each.
        numbers.update(dict.fromkeys(pair, number))
    for equation in other.jaxpr.eqns:
        key = _key(equation, numbers)
        if key is not None:
            first = len(inputs) + sum(map(len, known.values()))
            found = known.setdefault(key, list(range(first, first + len(equation.outvars))))
            numbers.update(zip(equation.outvars, found, strict=True))
    outputs = zip(other.jaxpr.outvars, results, strict=True)
    given = {numbers[v]: result for v, result in outputs if isinstance(v, Var) and v in numbers}
    numbers.update((result, number) for number, result in given.items())
    instead: dict[Var, Var] = {}
    equations = []
    for equation in program.jaxpr.eqns:
        found = known.get(_key(equation, numbers), [])
        numbers.update(zip(equation.outvars, found, strict=False))
        # Not every value of the other program is among its outputs. What it computed on the way must be computed again.
        if found and all(number in given for number in found):
            instead.update((v, given[number]) for v, number in zip(equation.outvars, found, strict=True))
        else:
            operands = [_replaced(v, instead) for v in equation.invars]
            equations.append(equation.replace(invars=operands))
    outvars = [_replaced(v, instead) for v in program.jaxpr.outvars]
    return ClosedJaxpr(program.jaxpr.replace(eqns=equations, outvars=outvars), program.consts)


def _key(equation: JaxprEqn, numbers: dict[Var, int]) -> Hashable:
    """Equal for equal operations on equal values; None where an operand has no number."""
    operands: list[Hashable] = []
    for atom in equation.invars:
        if isinstance(atom, Literal):
            operands.append((repr(atom.val), str(atom.aval)))
        elif atom in numbers:
            operands.append(numbers[atom])
        else:
            return None
    # Programs held by an equation print equal if they are; as objects they never are.
    return None if equation.effects else (equation.primitive.name, str(equation.params), tuple(operands))


def _replaced(atom: Var | Literal, instead: dict[Var, Var]) -> Var | Literal:
    return instead.get(atom, atom) if isinstance(atom, Var) else atom
