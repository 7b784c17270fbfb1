"""What the stages of a layout hold on each device, from the work of their layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from meshpipe.advise.layout import Layout
from meshpipe.advise.times import RECOMPUTING, SPLIT
from meshpipe.advise.work import LayerWork, ModelWork
from meshpipe.plan.plan import Op, Plan

BESIDE_RESIDUALS = 0.75
"""The share of residuals that XLA needs once more in temporaries, in a backward in one piece or after
rematerialisation: of the layer that it runs, or on CPU devices of all layers, whose residuals it reads well before it
needs them (tests/benchmarks/estimated_memory.py)."""

BESIDE_SPLIT = 0.2
"""The same for each part of a split backward."""


@dataclass(frozen=True, kw_only=True)
class StageNeeds:
    """Bytes on each device of a rank."""

    parameters: float
    """With what is computed from them once per step."""
    gradients: float
    optimizer: float
    batch: float
    activation: float
    """Of each microbatch, from its forward to its backward."""
    crossing: float
    """Of each microbatch, from the input part of its backward to the weight part."""
    made: float
    """The part of `crossing` that exists beside `activation` while the input part runs."""
    inside: float
    """While a backward, or its input part, runs: what it recomputes, and XLA's temporary memory."""
    inside_forward: float
    """XLA's temporary memory while a forward runs."""
    inside_weight: float
    """The same for the weight part of a backward."""
    boundary: float
    """What it hands to the next stage, for a microbatch."""

    @property
    def always(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.batch

    @property
    def least(self) -> float:
        """What it holds with a single microbatch."""
        return self.always + self.activation + self.inside


def needs_of(work: ModelWork, cut: range, layout: Layout, examples: float) -> StageNeeds:
    """The needs of the layers of a cut, for microbatches of so many examples on each part of the data axis."""
    layers = [work.layers[place] for place in cut]
    parts, tensor = (layout.data if layout.is_sharded else 1), layout.tensor
    held = [_held_by(layer, parts, tensor) for layer in layers]
    parameters, gradients, optimizer = (sum(sizes, 0.0) for sizes in zip(*held, strict=True))
    reads_batch = cut.start == 0 or cut.stop == len(work.layers)
    before = work.layers[cut.start - 1].output if cut.start else 0.0
    activation, crossing, made = _kept(layers, before, layout, examples)
    kept = [layer.kept[_policy(layout)].of(examples, tensor) for layer in layers]
    read = kept if work.runs_layers_apart or layout.remat == "layer" else [sum(kept)] * len(kept)
    inside = [_inside(*pair, layout, examples) for pair in zip(layers, read, strict=True)]
    whole = sum(kept) if layout.remat == "full" else 0.0
    return StageNeeds(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        batch=work.batch_bytes * examples * layout.num_microbatches if reads_batch else 0.0,
        activation=activation,
        crossing=crossing,
        made=made,
        inside=whole + max(of_layer.backward for of_layer in inside),
        inside_forward=max(of_layer.forward for of_layer in inside),
        inside_weight=max(of_layer.weight for of_layer in inside),
        boundary=layers[-1].output * examples if cut.stop < len(work.layers) else 0.0,
    )


@dataclass(frozen=True)
class _Inside:
    """What exists while the programs of a stage run one layer, beside what they are handed and return: the layers run
    one after the other, so of all layers the most counts.
    """

    forward: float
    backward: float
    """Of a whole backward, or of its input part. With what a layer recomputes of itself."""
    weight: float


def _inside(layer: LayerWork, read: float, layout: Layout, examples: float) -> _Inside:
    """Of a layer during whose backward the program reads so many bytes of residuals."""
    policy = _policy(layout)
    splits, recomputes = layout.schedule in SPLIT, layout.remat in RECOMPUTING

    def temporaries(op: Op) -> float:
        program = layer.programs[policy].get(op)
        return program.temporaries.of(examples) / (layout.tensor if layer.is_split else 1) if program else 0.0

    forward, backward = temporaries(Op.FORWARD), temporaries(Op.BACKWARD_INPUT if splits else Op.BACKWARD)
    beside = (BESIDE_SPLIT if splits and not recomputes else BESIDE_RESIDUALS) * read
    again = read if layout.remat == "layer" else 0.0
    return _Inside(
        forward,
        again + max(forward if recomputes else 0.0, backward) + beside,
        temporaries(Op.BACKWARD_WEIGHT) + BESIDE_SPLIT * read if splits else 0.0,
    )


def _policy(layout: Layout) -> str:
    """The rematerialisation whose residuals exist, if only while they are recomputed."""
    return "none" if layout.remat in RECOMPUTING else layout.remat


@lru_cache(maxsize=2**16)
def _held_by(layer: LayerWork, parts: int, tensor: int) -> tuple[float, float, float]:
    """Bytes of a layer on each device: parameters, gradients, optimizer state."""
    parameters = gradients = optimizer = 0.0
    for parameter in layer.parameters:
        kept, whole = parameter.on_device(parts, tensor), parameter.on_device(1, tensor)
        prepared = layer.prepared or (1.0 if parts > 1 and parameter.over_data is not None else 0.0)
        parameters += kept + prepared * whole
        if parameter.is_trained:
            gradients += layer.gradient_bytes * whole
            optimizer += layer.optimizer_bytes * kept
    return parameters, gradients, optimizer


def _kept(layers: Sequence[LayerWork], before: float, layout: Layout, examples: float) -> tuple[float, float, float]:
    """Bytes from forward to backward; from its input part to its weight part; those of these that the input part
    makes.
    """
    policy = _policy(layout)
    kept = [layer.kept[policy].of(examples, layout.tensor) for layer in layers]
    # The input and the weight part share out what is kept like the whole.
    shares = [layer.kept[policy].of(1.0, layout.tensor) / (layer.kept[policy].of(1.0, 1) or 1.0) for layer in layers]
    crossing = sum(s * examples * layer.kept[policy].crossing for s, layer in zip(shares, layers, strict=True))
    made = sum(s * examples * layer.kept[policy].made for s, layer in zip(shares, layers, strict=True))
    inputs = [examples * size for size in (before, *(layer.output for layer in layers[:-1]))]
    if layout.remat == "layer":
        return sum(inputs), crossing, made
    return inputs[0] if layout.remat == "full" else sum(kept), crossing, made


@dataclass(frozen=True)
class Held:
    """The fullest moment of one rank, in bytes on each device."""

    total: float
    activations: float
    """With what is recomputed, temporary memory, and values in transit."""


def held_by_rank(plan: Plan, rank: int, needs: Sequence[StageNeeds]) -> Held:
    """The most that a rank holds, if it runs its actions in order."""
    stages = plan.stages_of(rank)
    live = most = 0.0
    for action in plan.orders[rank]:
        stage = needs[action.stage]
        if action.op is Op.FORWARD:
            live += stage.activation
            most = max(most, live + stage.boundary + stage.inside_forward)
        elif action.op is Op.BACKWARD:
            most = max(most, live + stage.boundary + stage.inside)
            live -= stage.activation
        elif action.op is Op.BACKWARD_INPUT:
            most = max(most, live + stage.made + stage.boundary + stage.inside)
            live += stage.crossing - stage.activation
        else:
            most = max(most, live + stage.inside_weight)
            live -= stage.crossing
    return Held(sum(needs[stage].always for stage in stages) + most, most)
