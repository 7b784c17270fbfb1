"""The times of layers as they were measured on the devices of this machine."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from meshpipe.advise.layout import Layout
from meshpipe.advise.times import Seconds
from meshpipe.plan.plan import Op


@dataclass(frozen=True)
class Line:
    """Seconds by the number of examples, as they were measured at some; straight between them and beyond."""

    points: Sequence[tuple[float, float]]
    """By increasing examples, two at least."""

    def of(self, examples: float) -> float:
        right = bisect_left([size for size, _ in self.points], examples)
        right = min(max(1, right), len(self.points) - 1)
        (x, y), (xx, yy) = self.points[right - 1 : right + 1]
        return max(0.0, y + (yy - y) * (examples - x) / (xx - x))


@dataclass(frozen=True)
class LayerLines:
    """The times of one layer on one size of the tensor axis, by the examples of each part of the data axis."""

    programs: Mapping[Op, Line]
    """Without rematerialisation."""
    again: Mapping[str, Line]
    """By rematerialisation, how much longer a backward takes with it."""


@dataclass(frozen=True)
class Measured:
    """The measured times of every layer: on all devices, and on those of one rank while the others idle. Each part of
    the data axis had examples of its own, and the tensor axis its size: what it all-reduces is in the times, and how
    narrow it makes products.
    """

    layers: Mapping[tuple[int, int], Sequence[LayerLines]]
    """By the number of devices and the size of the tensor axis: the layers in order."""
    is_split: Sequence[bool]
    """Of every layer, whether the tensor axis splits it."""
    calls: Mapping[int, float] = field(default_factory=dict)
    """By the number of devices, seconds that a program takes whatever its layers."""
    per_byte: float = 0.0
    """Seconds that norm and update take for each byte of parameters on a device."""

    def seconds(self, place: int, op: Op, examples: float, layout: Layout) -> Seconds:
        """As `LayerTimes` has it."""
        count = layout.data * layout.tensor
        if not self._is_apart(layout):
            return self._on(self._all, place, op, examples, layout)
        own = self._on(count, place, op, examples, layout)
        # Programs of several devices that share cores take turns; those of one run beside each other.
        busy = own * float(layout.pipeline) if count > 1 else self._on(self._all, place, op, examples, layout)
        return replace(busy, alone=own.total)

    def per_call(self, layout: Layout) -> Seconds:
        """As `LayerTimes` has it."""
        count, of_all = layout.data * layout.tensor, self.calls.get(self._all, 0.0)
        if not self._is_apart(layout):
            return Seconds(of_all)
        own = self.calls.get(count, of_all)
        return Seconds(own * float(layout.pipeline) if count > 1 else of_all, alone=own)

    def update(self, parameters: float, gradients: float, optimizer: float) -> float:
        """As `LayerTimes` has it."""
        return self.per_byte * parameters

    @cached_property
    def _all(self) -> int:
        return max(count for count, _ in self.layers)

    def _is_apart(self, layout: Layout) -> bool:
        """Whether the devices of a rank were measured while the others idle."""
        count = layout.data * layout.tensor
        return count < self._all and layout.pipeline > 1 and (count, layout.tensor) in self.layers

    def _on(self, count: int, place: int, op: Op, examples: float, layout: Layout) -> Seconds:
        """On so many devices. The tensor axis costs what a layer takes beyond its part of the undivided one. A size of
        that axis that was not measured has the times of the smallest one that was.
        """
        least = min(tensor for devices, tensor in self.layers if devices == count)
        layer = self.layers.get((count, layout.tensor), self.layers[count, least])[place]
        if op not in layer.programs:
            return Seconds()
        total, again = layer.programs[op].of(examples), 0.0
        if op in (Op.BACKWARD, Op.BACKWARD_INPUT) and layout.remat in layer.again:
            again = layer.again[layout.remat].of(examples)
        undivided = self.layers[count, 1][place].programs if (count, 1) in self.layers else {}
        if layout.tensor == 1 or op not in undivided or not self.is_split[place]:
            return Seconds(total, again)
        part = min(total, undivided[op].of(examples) / layout.tensor)
        return Seconds(part, again, total - part)
