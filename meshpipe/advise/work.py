"""What the layers of a model compute, move and keep, as numbers from which every layout can be estimated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshpipe.plan.plan import Op


@dataclass(frozen=True)
class Amount:
    """What a program needs for a microbatch: some of it whatever the size, the rest for each example."""

    fixed: float = 0.0
    each: float = 0.0

    @classmethod
    def through(cls, one: float, two: float) -> "Amount":
        """The amount that was found for one example and for two."""
        each = max(0.0, two - one)
        return cls(max(0.0, one - each), each)

    def of(self, examples: float) -> float:
        return self.fixed + self.each * examples


@dataclass(frozen=True)
class ProgramWork:
    """One program of a layer on one microbatch, on a single device."""

    operations: Mapping[str, Amount] = field(default_factory=dict)
    """Floating-point operations of products, by the dtype of the operands."""
    memory: Amount = Amount()
    """Bytes read from memory and written to it."""
    temporaries: Amount = Amount()
    """Bytes that exist only while it runs."""


@dataclass(frozen=True)
class Kept:
    """Bytes that a layer keeps of each example, under one rematerialisation. The parts that the tensor axis splits are
    apart from those that each of its devices has whole.
    """

    whole: float = 0.0
    """From forward to backward."""
    split: float = 0.0
    crossing: float = 0.0
    """What the input part of a split backward keeps for the weight part, on a single device."""
    made: float = 0.0
    """The part of it that the input part makes, and forward did not."""

    def of(self, examples: float, tensor: int) -> float:
        """On each device, for so many examples of it."""
        return examples * (self.whole + self.split / tensor)


@dataclass(frozen=True)
class ParameterWork:
    """One parameter: its bytes, and the logical axes that mesh axes may split."""

    path: str
    shape: tuple[int, ...]
    nbytes: int
    over_tensor: int | None
    """The dim that the tensor axis splits."""
    over_data: int | None
    """The dim that the data axis splits between steps, where parameters are fully sharded."""
    is_trained: bool = True

    def on_device(self, data: int, tensor: int) -> float:
        return (
            self.nbytes / (tensor if self.over_tensor is not None else 1) / (data if self.over_data is not None else 1)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWork:
    """One layer, the last with the loss."""

    kind: str
    programs: Mapping[str, Mapping[Op, ProgramWork]]
    """By the name of the rematerialisation, of those that store residuals (`none`, policies), and by what it does; of
    a layer that has no backward, forward alone."""
    parameters: tuple[ParameterWork, ...]
    kept: Mapping[str, Kept]
    """By the name of the rematerialisation, as `programs`."""
    output: float
    """Bytes of its output, for each example."""
    gradient_bytes: float
    """Of an accumulator, for each byte of its parameter."""
    optimizer_bytes: float
    """Of the optimizer's state, for each byte of a trained parameter."""
    prepared: float
    """Bytes computed from the parameters once per step, such as a bfloat16 copy, for each byte of a parameter."""
    reduces_forward: float = 0.0
    """Bytes for each example that the tensor axis all-reduces in forward."""
    reduces_backward: float = 0.0
    num_reduces: int = 0
    """All-reduces of the tensor axis in forward; backward has about as many."""

    @property
    def is_split(self) -> bool:
        """Whether the tensor axis splits its parameters, and thereby what it computes."""
        return any(parameter.over_tensor is not None for parameter in self.parameters)


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """All layers in order, and what is known of the batch."""

    layers: tuple[LayerWork, ...]
    batch_bytes: float
    """Bytes of an example of the batch."""
    tokens: int | None
    """Tokens of an example; None where there are none."""
    runs_layers_apart: bool
    """Whether XLA finishes with a layer before it begins with the next, as for accelerators."""

    def why_not_split(self, data: int, tensor: int, *, is_sharded: bool) -> str | None:
        """The first parameter that does not divide, in words; None if all do, and an axis has something to split."""
        if tensor > 1 and all(parameter.over_tensor is None for parameter in self.parameters):
            return "no parameter names an axis that tensor splits"
        for parameter in self.parameters:
            axes = [("tensor", tensor, parameter.over_tensor)]
            axes += [("data", data, parameter.over_data)] * is_sharded
            for axis, parts, dim in axes:
                if dim is not None and parameter.shape[dim] % parts:
                    size = parameter.shape[dim]
                    return f"{axis} {parts} does not divide dim {dim} of {parameter.path}, which has {size}"
        return None

    @property
    def parameters(self) -> Sequence[ParameterWork]:
        return [parameter for layer in self.layers for parameter in layer.parameters]
