"""Sums over the examples of a microbatch that stay unreduced: one partial sum for each part of the data axis.

The gradient of a parameter is such a sum. Where devices split the examples, XLA would all-reduce it in every
microbatch. Instead, each device accumulates the partial sums of its own examples, and one all-reduce is left for the
end of the step.
"""

from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var
from jax.sharding import PartitionSpec

from meshpipe.mesh import DATA
from meshpipe.stage.jaxpr import apply_equation, inline, scan_sizes, variables

Atom: TypeAlias = Var | jax.extend.core.Literal
Use: TypeAlias = int | str
"""What the partial sums of a result read of an operand: equal runs of this dim, its partial sums, or all of it."""
UNREDUCED, WHOLE = "unreduced", "whole"

LINEAR = frozenset(
    {
        *("broadcast_in_dim", "convert_element_type", "copy", "cumsum", "expand_dims", "neg", "reduce_sum", "reshape"),
        *("rev", "sharding_constraint", "slice", "split", "squeeze", "transpose", "unstack"),
    }
)
"""Operations of one operand that may be applied to each partial sum, as they are linear."""


class PartialSums:
    """A traced program, and which outputs it can return unreduced: as `[parts, ...]`, whose sum is the output.

    It looks for operations that sum over the examples: a matrix product, a convolution, a sum, or a scatter whose
    operands have the examples as leading dim, perhaps transposed. A dim counts as the examples if its length is
    `examples` or a multiple of it. The operation is then done for `parts` equal runs of that dim, and everything
    between it and the output must be linear. The partial sums add up to the output whatever that dim really is, so a
    wrong guess costs communication and never correctness. Where the guess is right, the dim is the one that devices
    split, and no device needs values of another. Sums inside a `jax.lax.scan` are found as well.

    Inputs at `unreduced` are partial sums themselves; only operations linear in them may use them.
    """

    def __init__(self, closed: ClosedJaxpr, parts: int, examples: int, unreduced: Collection[int] = ()):
        self._closed, self._parts, self._examples = inline(closed), parts, examples
        jaxpr = self._closed.jaxpr
        self._inputs = frozenset(unreduced)
        self._zeros: set[Var] = set()
        self._unreduced: set[Var] = {jaxpr.invars[i] for i in unreduced}
        self._loops: dict[int, _Loop] = {}
        """Its scans, by the number of the equation."""
        self._transposed = {e.outvars[0]: e for e in jaxpr.eqns if e.primitive.name == "transpose"}
        self._same = {
            after: before
            for e in jaxpr.eqns
            if e.primitive.name == "optimization_barrier"
            for before, after in zip(e.invars, e.outvars, strict=True)
        }
        # Forward through the program, so that what an equation reads is known before the equation.
        for index, equation in enumerate(jaxpr.eqns):
            name = equation.primitive.name
            if name == "scan":
                self._loops[index] = loop = _Loop(equation, self)
                self._unreduced.update(equation.outvars[i] for i in loop.unreduced)
            # Zeros are partial sums of zero. A gradient that a scan accumulates starts from them.
            elif name == "broadcast_in_dim" and self._is_zero(equation.invars[0]):
                self._zeros.update(equation.outvars)
            elif self._uses(equation) is not None:
                self._unreduced.update(equation.outvars)
        self.available = frozenset(i for i, v in enumerate(jaxpr.outvars) if self._is_unreduced(v))
        """The outputs that can be returned unreduced."""

    def run(self, arguments: Sequence[Any], outputs: Collection[int]) -> list[Any]:
        """All outputs, those at `outputs` unreduced.

        To be traced inside `jax.jit`, which removes what is computed and not used, with a mesh set whose data axis has
        `parts` devices.
        """
        jaxpr = self._closed.jaxpr
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, self._closed.consts, strict=True))
        partials: dict[Any, Any] = {}
        for i, (variable, argument) in enumerate(zip(jaxpr.invars, arguments, strict=True)):
            (partials if i in self._inputs else values)[variable] = argument

        def read(atom: Atom, use: Use = WHOLE) -> Any:
            if use == UNREDUCED:
                zeros = jnp.zeros((self._parts, *atom.aval.shape), atom.aval.dtype)  # type: ignore[attr-defined]
                return zeros if self._is_zero(atom) else partials[atom]
            value = values[atom] if isinstance(atom, Var) else atom.val
            if isinstance(use, str):
                return value
            before, size, after = value.shape[:use], value.shape[use], value.shape[use + 1 :]
            return value.reshape(*before, self._parts, size // self._parts, *after)

        axes: dict[Use, int | str | None] = {WHOLE: None, UNREDUCED: 0}
        for index, equation in enumerate(jaxpr.eqns):
            loop, uses = self._loops.get(index), self._uses(equation)
            if loop is not None and loop.unreduced:
                operands = [read(v, UNREDUCED if i in loop.operands else WHOLE) for i, v in enumerate(equation.invars)]
                for i, (variable, result) in enumerate(zip(equation.outvars, loop.run(operands), strict=True)):
                    values[variable] = result.sum(0, dtype=result.dtype) if i in loop.unreduced else result
                    if i in loop.unreduced:
                        partials[variable] = result
                continue
            # Whole and partial values are both traced, as a later equation may read either; XLA removes what is not
            # used.
            if all(v in values for v in variables(equation.invars)):
                operands = [read(v) for v in equation.invars]
                values.update(zip(equation.outvars, apply_equation(jaxpr, equation, operands), strict=True))
            if uses is not None and equation.primitive.name == "conv_general_dilated":
                partials[equation.outvars[0]] = _convolve_parts(equation, [values[v] for v in equation.invars], uses)
            elif uses is not None:
                # Cutting the examples into parts leaves their sharding on the dim of the parts, so XLA's partitioner
                # keeps every part on its own device.
                operands = [read(v, use) for v, use in zip(equation.invars, uses, strict=True)]
                each = jax.vmap(
                    lambda *operands, equation=equation: equation.primitive.bind(*operands, **equation.params),
                    in_axes=[axes.get(use, use) for use in uses],
                )
                results = each(*operands)
                partials.update(zip(equation.outvars, results if isinstance(results, list) else [results], strict=True))
        return [read(v, UNREDUCED if i in outputs else WHOLE) for i, v in enumerate(jaxpr.outvars)]

    def _uses(self, equation: JaxprEqn) -> tuple[Use, ...] | None:
        """What the partial sums of the result read of each operand; None where the result has none."""
        operands, params = equation.invars, equation.params
        if not _keeps_sums(equation):
            return None
        known = [self._is_unreduced(v) for v in operands]
        dims: list[Any] = [self._examples_dim(v) for v in operands]
        match equation.primitive.name:
            # A product is linear in either factor, and not in both: the sum of products is no product of sums.
            case "mul" | "dot_general" if known[0] != known[1]:
                return (UNREDUCED, WHOLE) if known[0] else (WHOLE, UNREDUCED)
            case "div" | "pad" if known[0] and (equation.primitive.name == "div" or self._is_zero(operands[1])):
                return UNREDUCED, WHOLE
            case "select_n" if all(known[1:]):
                return WHOLE, *(UNREDUCED,) * (len(operands) - 1)
            case "add" | "add_any" | "sub" | "concatenate" | "stack" if all(known):
                return (UNREDUCED,) * len(operands)
            case name if name in LINEAR and known[0]:
                return UNREDUCED, *(WHOLE,) * (len(operands) - 1)
            case "dot_general" if tuple(dims) in zip(*params["dimension_numbers"][0], strict=True):
                return dims[0], dims[1]
            case "conv_general_dilated" if tuple(dims) == _summed_dims(equation):
                return dims[0], dims[1]
            case "reduce_sum" if dims[0] in params["axes"]:
                return (dims[0],)
            # The gradient of an embedding: rows of the output's gradient are added to the rows of their tokens.
            case "scatter-add" if known[0] and dims[1] == 0 and dims[2] == 0:
                numbers = params["dimension_numbers"]
                is_summed = 0 not in numbers.update_window_dims and not numbers.operand_batching_dims
                return (UNREDUCED, 0, 0) if is_summed else None
        return None

    def _examples_dim(self, atom: Atom) -> int | None:
        """The dim of a value that may hold the examples: the leading one, before it was transposed."""
        while isinstance(atom, Var) and atom in self._same:
            atom = self._same[atom]
        # A derivative transposes what it multiplies, which moves the dim of the examples.
        before = self._transposed.get(atom) if isinstance(atom, Var) else None
        if before is not None:
            dim = self._examples_dim(before.invars[0])
            return None if dim is None else before.params["permutation"].index(dim)
        size = (*getattr(atom.aval, "shape", ()), 0)[0]
        return 0 if size > 0 and size % self._examples == 0 and size % self._parts == 0 else None

    def _is_unreduced(self, atom: Atom) -> bool:
        return self._is_zero(atom) or (isinstance(atom, Var) and atom in self._unreduced)

    def _is_zero(self, atom: Atom) -> bool:
        return atom in self._zeros if isinstance(atom, Var) else not np.any(atom.val)


def _keeps_sums(equation: JaxprEqn) -> bool:
    """Whether the dtypes let partial results add up to the whole result: nothing is rounded to integers or wraps
    around.
    """
    results = [v.aval.dtype for v in equation.outvars if hasattr(v.aval, "dtype")]
    operands = [v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")]
    if all(jnp.issubdtype(dtype, jnp.inexact) for dtype in results):
        return True
    wide = all(jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize >= 4 for dtype in (*results, *operands))
    return wide and equation.primitive.name != "div"


def _summed_dims(convolution: JaxprEqn) -> tuple[int, int] | None:
    """The dims that a convolution sums over besides its window. In the gradient of a kernel, they are the examples."""
    numbers = convolution.params["dimension_numbers"]
    is_whole = convolution.params["feature_group_count"] == 1
    return (numbers.lhs_spec[1], numbers.rhs_spec[1]) if is_whole else None


def _convolve_parts(convolution: JaxprEqn, operands: Sequence[jax.Array], dims: Sequence[Any]) -> jax.Array:
    """The partial sum of each device of the data axis.

    `jax.vmap` would turn the parts into groups of features, which XLA's partitioner gathers on every device.
    """
    return jax.shard_map(
        lambda *own: convolution.primitive.bind(*own, **convolution.params)[None],
        in_specs=tuple(PartitionSpec(*[None] * dim, DATA) for dim in dims),
        out_specs=PartitionSpec(DATA),
        axis_names={DATA},
    )(*operands)


class _Loop:
    """A scan whose body can accumulate, or stack, partial sums in place of whole ones."""

    def __init__(self, equation: JaxprEqn, around: PartialSums):
        params = equation.params
        body = inline(params["jaxpr"])
        jaxpr = body.jaxpr
        self._num_consts, self._num_carry = num_consts, num_carry = scan_sizes(equation)
        self._options = {name: params[name] for name in ("length", "reverse", "unroll")}
        # A value that the body accumulates can stay unreduced if what is added to it in each turn can, and so can what
        # it starts from. Only then may its body be given partial sums as a carry.
        plain = PartialSums(body, around._parts, around._examples)
        added = {
            i: added_value
            for i in range(num_carry)
            if (added_value := _value_added(jaxpr, jaxpr.invars[num_consts + i], jaxpr.outvars[i])) is not None
            and plain._is_unreduced(added_value)
            and around._is_unreduced(equation.invars[num_consts + i])
        }
        self.operands = frozenset(num_consts + i for i in added)
        """The operands of the scan that must be given unreduced."""
        self._body = PartialSums(body, around._parts, around._examples, self.operands)
        self.unreduced: frozenset[int] = frozenset(added) | {i for i in self._body.available if i >= num_carry}
        """The results that come unreduced."""

    def run(self, operands: Sequence[Any]) -> list[Any]:
        consts, rest = operands[: self._num_consts], operands[self._num_consts :]

        def body(carry: Any, slices: Any) -> tuple[Any, Any]:
            results = self._body.run((*consts, *carry, *slices), self.unreduced)
            return results[: self._num_carry], results[self._num_carry :]

        carry, stacked = jax.lax.scan(body, rest[: self._num_carry], rest[self._num_carry :], **self._options)
        parts_first = [
            jnp.moveaxis(v, 1, 0) if i in self.unreduced else v for i, v in enumerate(stacked, self._num_carry)
        ]
        return [*carry, *parts_first]


def _value_added(jaxpr: Jaxpr, carry: Var, result: Atom) -> Atom | None:
    """What the body adds to a carry that it uses for nothing else; None where it does anything else with it."""
    users = [equation for equation in jaxpr.eqns if carry in equation.invars]
    if len(users) != 1 or users[0].primitive.name not in ("add", "add_any") or users[0].outvars[0] is not result:
        return None
    if any(result in equation.invars for equation in jaxpr.eqns) or carry in jaxpr.outvars:
        return None
    if jaxpr.outvars.count(result) > 1:
        return None
    left, right = users[0].invars
    return right if left is carry else left
