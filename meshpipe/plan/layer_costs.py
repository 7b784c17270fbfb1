"""Costs of the layers of a model, times and bytes, measured or given: plain data with a JSON form."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from meshpipe.errors import ArgumentError
from meshpipe.files import read_text
from meshpipe.plan.plan import Op
from meshpipe.plan.simulate import Costs


@dataclass(frozen=True)
class LayerCosts:
    """The costs of one layer as a stage of its own; the last layer with the loss. Times are per microbatch, in
    seconds.
    """

    kind: str
    """Name of its class."""
    forward: float
    backward: float
    backward_input: float
    """The first part of a split backward: the gradient of the input."""
    backward_weight: float
    """The second part: the gradients of the parameters."""
    transfer: float
    """The time to move its output to the next rank; 0 if there is no other rank."""
    parameter_bytes: int
    """On each device of the rank."""
    activation_bytes: int
    """Bytes that its forward stores of one microbatch, on each device of the rank."""

    def time(self, op: Op) -> float:
        return {
            Op.FORWARD: self.forward,
            Op.BACKWARD: self.backward,
            Op.BACKWARD_INPUT: self.backward_input,
            Op.BACKWARD_WEIGHT: self.backward_weight,
        }[op]

    def total(self, whole_backward: bool = True) -> float:
        """Forward and backward of one microbatch, backward whole or in two parts."""
        return self.forward + (self.backward if whole_backward else self.backward_input + self.backward_weight)


@dataclass(frozen=True)
class Setting:
    """What the costs depend on, besides the layers."""

    microbatch_size: int
    """Number of examples, over the whole data axis."""
    data: int
    tensor: int
    remat: str


@dataclass(frozen=True)
class ModelCosts:
    """The costs of all layers, in order, and where they come from."""

    layers: tuple[LayerCosts, ...]
    setting: Setting
    device: str
    """The platform that they were measured on, e.g. `cpu`, or how they were counted."""
    seconds: float
    """How long measuring took, in seconds."""
    file: str | None = None
    """The file that they were read from; None if this process measured them."""
    counted: str | None = None
    """Why they were counted in the traced programs, and not measured; None if they were measured."""

    def describe(self) -> str:
        """Where the costs come from, in a few words."""
        how = f"measured on {self.device}" if self.counted is None else self.device
        if self.file is not None:
            return f"costs of {self.file}, {how}"
        return f"costs {how} in {self.seconds:.1f} s" if self.counted is None else f"costs {how}"

    def of_stages(self, cuts: Sequence[range]) -> Costs:
        """The times of stages, as sums over their layers; the longest of the transfers between stages."""
        times: dict[Op | tuple[int, Op], float] = {
            (stage, op): sum(self.layers[layer].time(op) for layer in cut)
            for stage, cut in enumerate(cuts)
            for op in Op
        }
        return Costs(times, max((self.layers[cut[-1]].transfer for cut in cuts[:-1]), default=0.0))

    def check(self, kinds: Sequence[str], setting: Setting) -> None:
        """Raises `ValueError` for the costs of other layers, or of another setting."""
        found = [layer.kind for layer in self.layers]
        source = self.file or "measuring"
        if len(found) != len(kinds):
            raise ValueError(
                "Costs must belong to the model's layers. "
                f"Got {len(found)} layers in {source}, and the model has "
                f"{len(kinds)}. {AGAIN}"
            )
        for index, (kind, expected) in enumerate(zip(found, kinds, strict=True)):
            if kind != expected:
                raise ValueError(
                    "Costs must belong to the model's layers. "
                    f"Got {kind} for layer {index} in {source}, and the model has "
                    f"{expected}. {AGAIN}"
                )
        for field in fields(Setting):
            before, now = getattr(self.setting, field.name), getattr(setting, field.name)
            if before != now:
                name = field.name.replace("_", " ")
                raise ValueError(
                    "Costs must be measured in the setting in which they are used. "
                    f"Got {name} {before} in {source}, and {now} here. {AGAIN}"
                )

    def save(self, file: Path) -> None:
        values = {
            "device": self.device,
            "seconds": self.seconds,
            "setting": asdict(self.setting),
            "layers": [asdict(layer) for layer in self.layers],
        } | ({} if self.counted is None else {"counted": self.counted})
        file.write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, file: str) -> "ModelCosts":
        """Raises `ValueError` naming the file when it cannot be read or is not what `save` writes."""
        try:
            values = json.loads(read_text(file))
        except OSError as error:
            raise ArgumentError(f"`costs` must name a readable file. Got {file!r}: {error.strerror}. {AGAIN}") from None
        except (ValueError, RecursionError) as error:
            raise ArgumentError(
                f"`costs` must name a JSON file of layer costs. Got {file!r}: {error}. {AGAIN}"
            ) from None
        try:
            costs = cls(
                tuple(_checked(LayerCosts, layer) for layer in values["layers"]),
                _checked(Setting, values["setting"]),
                str(values["device"]),
                float(values["seconds"]),
                file,
                None if values.get("counted") is None else str(values["counted"]),
            )
            costs.of_stages([range(len(costs.layers))])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise ArgumentError(
                f"`costs` must name a JSON file of layer costs. Got {file!r}: {what}. {AGAIN}"
            ) from None
        return costs


AGAIN = "Measure again by `meshpipe plan RECIPE --profile --save-costs FILE.json`, with the same flags."


def _checked(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A dataclass of strings and numbers from a JSON object. Raises `ValueError` naming the field that is wrong."""
    made = {}
    for field in fields(kind):
        value = values[field.name]
        allowed = {str: str, int: int, float: int | float}[field.type]  # type: ignore[index]
        if (
            not isinstance(value, allowed)
            or isinstance(value, bool)
            or (not isinstance(value, str) and not 0 <= value < math.inf)
        ):
            raise ValueError(f"{field.name} is {value!r}")
        made[field.name] = field.type(value)  # type: ignore[operator]
    return kind(**made)
