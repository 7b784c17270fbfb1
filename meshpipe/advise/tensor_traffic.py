"""Finds in a traced layer what the tensor axis all-reduces."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

from jax.extend.core import JaxprEqn, Literal, Var
from jax.sharding import PartitionSpec

from meshpipe.mesh import TENSOR
from meshpipe.stage.traced import TracedStage

SAME_DIMS = {"convert_element_type", "copy", "optimization_barrier", "stop_gradient", "mul", "add", "neg", "sub", "div"}
"""Operations whose result has the dims of their operand."""


@dataclass
class TensorTraffic:
    """Bytes of a microbatch that the parts of the tensor axis all-reduce, as Megatron-LM has it (arXiv 1909.08053)."""

    forward: float = 0.0
    """Of products over a dim that is split: each part has a summand."""
    backward: float = 0.0
    """Gradients of what is multiplied by a parameter that is split in another dim: each part has a summand. What
    several such products read is all-reduced once."""
    count: int = 0
    """All-reduces of forward."""


def tensor_traffic(stage: TracedStage) -> TensorTraffic:
    """What the traced layer would all-reduce; its submesh must have a tensor axis of several devices."""
    split: dict[Var, set[int]] = {
        var: dims
        for var, leaf in zip(stage.param_vars, stage.params, strict=True)
        if (dims := _split_dims(leaf.sharding.spec))
    }
    found = TensorTraffic()
    read_by_products: dict[Var, float] = {}
    for equation in stage.closed.jaxpr.eqns:
        operands = [v for v in equation.invars if isinstance(v, Var) and v in split]
        if not operands:
            continue
        kept = _same(equation, operands[0], split[operands[0]])
        if kept is not None:
            split.update(dict.fromkeys(equation.outvars, kept))
        elif equation.primitive.name in ("dot_general", "gather", "conv_general_dilated"):
            if _sums_over_split(equation, operands[0], split[operands[0]]):
                found.forward += _bytes(equation.outvars[0])
                found.count += 1
            else:
                read_by_products |= {v: _bytes(v) for v in _others(equation, operands[0])}
    found.backward = sum(read_by_products.values(), 0.0)
    return found


def _split_dims(spec: PartitionSpec) -> set[int]:
    return {dim for dim, axis in enumerate(spec) if axis == TENSOR or (isinstance(axis, tuple) and TENSOR in axis)}


def _same(equation: JaxprEqn, operand: Var, dims: set[int]) -> set[int] | None:
    """The split dims of the result of an operation that only converts or moves a parameter; None for others."""
    name, params = equation.primitive.name, equation.params
    shape = _shape(equation.outvars[0])
    if name in SAME_DIMS and shape == _shape(operand):
        return dims
    if name == "transpose":
        return {place for place, dim in enumerate(params["permutation"]) if dim in dims}
    if name == "broadcast_in_dim":
        return {params["broadcast_dimensions"][dim] for dim in dims}
    if name == "reshape" and len(dims) == 1:
        # The dim begins at the same number of elements before it, or it is not followed further.
        (dim,) = dims
        before = prod(_shape(operand)[:dim])
        return next(({place} for place in range(len(shape)) if prod(shape[:place]) == before), None)
    return None


def _sums_over_split(equation: JaxprEqn, operand: Var, dims: set[int]) -> bool:
    if equation.primitive.name == "gather":  # rows are looked up: each part has some of them
        sizes = equation.params["slice_sizes"]
        return any(sizes[dim] < _shape(operand)[dim] for dim in dims)
    if equation.primitive.name == "conv_general_dilated":
        return equation.params["dimension_numbers"].rhs_spec[1] in dims
    place = 0 if equation.invars[0] is operand else 1
    contracted = equation.params["dimension_numbers"][0][place]
    return bool(dims.intersection(contracted))


def _others(equation: JaxprEqn, operand: Var) -> Iterator[Var]:
    return (v for v in equation.invars if not isinstance(v, Literal) and v is not operand)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.aval.shape)


def _bytes(value: Any) -> float:
    return float(prod(_shape(value)) * value.aval.dtype.itemsize)
