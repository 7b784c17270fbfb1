"""How long the work of a layer takes: by the rates of a described machine, or as it was measured."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from meshpipe.advise.layout import Layout
from meshpipe.advise.work import LayerWork, ModelWork, ProgramWork
from meshpipe.hardware.hardware import Hardware
from meshpipe.hardware.links import Group, collective_seconds
from meshpipe.plan.plan import Op

RECOMPUTING = ("layer", "full")
"""The rematerialisations whose backward runs all of forward again."""
SPLIT = ("zb-h1", "zb-h2", "zb-v", "dualpipe-v")
"""The schedules whose backwards are in two parts."""


@dataclass(frozen=True)
class Seconds:
    """The time of one program of one layer on one microbatch."""

    compute: float = 0.0
    recompute: float = 0.0
    """What rematerialisation adds, with its collectives."""
    tensor: float = 0.0
    """Collectives of the tensor axis."""

    @property
    def total(self) -> float:
        return self.compute + self.recompute + self.tensor

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.compute + other.compute, self.recompute + other.recompute, self.tensor + other.tensor)

    def __mul__(self, count: float) -> "Seconds":
        return Seconds(count * self.compute, count * self.recompute, count * self.tensor)


@runtime_checkable
class LayerTimes(Protocol):
    """The times of the layers of a model."""

    @property
    def per_call(self) -> float:
        """Seconds that a program takes beside those of its layers, with all devices busy."""
        ...

    def seconds(self, place: int, op: Op, examples: float, layout: Layout) -> Seconds:
        """The time of a layer, by its place, for so many examples of a microbatch on each part of the data axis."""
        ...

    def update(self, parameters: float, gradients: float, optimizer: float) -> float:
        """The time of the norm and of the update, for so many bytes on a device."""
        ...


class Roofline:
    """A program takes as long as its products or its memory traffic, whichever takes longer, and its collectives."""

    per_call = 0.0

    def __init__(self, work: ModelWork, hardware: Hardware) -> None:
        self._work, self._hardware = work, hardware

    def seconds(self, place: int, op: Op, examples: float, layout: Layout) -> Seconds:
        layer = self._work.layers[place]
        tensor = layout.tensor if layer.is_split else 1
        recomputes = layout.remat in RECOMPUTING
        programs = layer.programs["none" if recomputes else layout.remat]
        if op not in programs:
            return Seconds()
        compute = self._of(programs[op], examples, tensor)
        of_weights = Op.BACKWARD_WEIGHT if Op.BACKWARD_WEIGHT in programs else Op.BACKWARD_INPUT
        if op in (Op.BACKWARD, of_weights):
            compute += self._accumulate(layer, tensor)
        own = Seconds(compute, 0.0, self._reduces(layer, op, examples, tensor))
        if not recomputes or op not in (Op.BACKWARD, Op.BACKWARD_INPUT):
            return own
        again = self._of(programs[Op.FORWARD], examples, tensor) + self._reduces(layer, Op.FORWARD, examples, tensor)
        return own + Seconds(recompute=again)

    def update(self, parameters: float, gradients: float, optimizer: float) -> float:
        # The norm reads the gradients before the update does.
        moved = 2 * (parameters + gradients + optimizer)
        return moved / (self._hardware.memory_bandwidth * self._hardware.efficiency["memory"])

    def _of(self, program: ProgramWork, examples: float, tensor: int) -> float:
        hardware = self._hardware
        products = sum(amount.of(examples) / hardware.rate(dtype) for dtype, amount in program.operations.items())
        products /= hardware.efficiency["products"]
        moved = program.memory.of(examples) / (hardware.memory_bandwidth * hardware.efficiency["memory"])
        return max(products, moved) / tensor

    def _accumulate(self, layer: LayerWork, tensor: int) -> float:
        """The time to add the gradients of a microbatch to their accumulators, which are read and written."""
        sizes = (parameter.on_device(1, tensor) for parameter in layer.parameters if parameter.is_trained)
        nbytes = 2 * layer.gradient_bytes * sum(sizes)
        return nbytes / (self._hardware.memory_bandwidth * self._hardware.efficiency["memory"])

    def _reduces(self, layer: LayerWork, op: Op, examples: float, tensor: int) -> float:
        if tensor == 1 or op is Op.BACKWARD_WEIGHT:
            return 0.0
        nbytes = (layer.reduces_forward if op is Op.FORWARD else layer.reduces_backward) * examples
        return collective_seconds("all-reduce", nbytes, Group(tensor), self._hardware, max(1, layer.num_reduces))
