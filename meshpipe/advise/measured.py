"""The times of layers as they were measured on the devices of this machine."""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """The measured times of every layer. All devices were busy at once, each part of the data axis with examples of its
    own, and the tensor axis had its size: what it all-reduces is in the times, and how narrow it makes products.
    """

    layers: Mapping[int, Sequence[LayerLines]]
    """By the size of the tensor axis: the layers in order."""
    is_split: Sequence[bool]
    """Of every layer, whether the tensor axis splits it."""
    per_call: float = 0.0
    """Seconds that a program takes whatever its layers."""
    per_byte: float = 0.0
    """Seconds that norm and update take for each byte of parameters on a device."""

    def seconds(self, place: int, op: Op, examples: float, layout: Layout) -> Seconds:
        """As `LayerTimes` has it. The tensor axis costs what a layer takes beyond its part of the undivided one. A size
        of that axis that was not measured has the times of the smallest one that was.
        """
        layer = self.layers.get(layout.tensor, self.layers[min(self.layers)])[place]
        if op not in layer.programs:
            return Seconds()
        total, again = layer.programs[op].of(examples), 0.0
        if op in (Op.BACKWARD, Op.BACKWARD_INPUT) and layout.remat in layer.again:
            again = layer.again[layout.remat].of(examples)
        if layout.tensor == 1 or 1 not in self.layers or not self.is_split[place]:
            return Seconds(total, again)
        part = min(total, self.layers[1][place].programs[op].of(examples) / layout.tensor)
        return Seconds(part, again, total - part)

    def update(self, parameters: float, gradients: float, optimizer: float) -> float:
        """As `LayerTimes` has it."""
        return self.per_byte * parameters
